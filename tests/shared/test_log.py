import io
import json
import logging
import warnings
from collections.abc import Iterator

import pytest
import structlog

from mell_shared.log import configure_logging


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        """Say so."""
        return True


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()
    logging.captureWarnings(capture=False)
    root.handlers[:], root.level = handlers, level


def test_json_lines_say_who_when_and_what() -> None:
    """Each event is one JSON object with service, id, level, UTC time and its fields."""
    stream = io.StringIO()
    configure_logging("info", "json", service="kitchen", process="kitchen-1", stream=stream)
    structlog.contextvars.bind_contextvars(request="r1")
    structlog.get_logger().info("dish_served", guests=3)
    event = json.loads(stream.getvalue())
    assert event.pop("timestamp").endswith("Z")
    assert event == {
        "event": "dish_served",
        "guests": 3,
        "service": "kitchen",
        "id": "kitchen-1",
        "level": "info",
        "request": "r1",
    }


def test_the_standard_library_s_logging_comes_the_same_way() -> None:
    """Libraries' records and warnings are JSON lines beside ours, with the logger's name."""
    stream = io.StringIO()
    configure_logging("info", "json", service="kitchen", process="kitchen-1", stream=stream)
    logging.getLogger("library.part").warning("%d pots", 2)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("hot", stacklevel=1)
    first, second = (json.loads(line) for line in stream.getvalue().splitlines())
    assert (first["event"], first["logger"], first["level"]) == ("2 pots", "library.part", "warning")
    assert (first["service"], first["id"]) == ("kitchen", "kitchen-1")
    assert "hot" in second["event"]


def test_the_level_holds_for_ours_and_theirs() -> None:
    """What is less severe than the level does not appear, wherever it comes from."""
    stream = io.StringIO()
    configure_logging("warning", "json", service="s", process="p", stream=stream)
    structlog.get_logger().info("quiet")
    logging.getLogger("library").info("quiet")
    structlog.get_logger().error("loud")
    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == ["loud"]


@pytest.mark.parametrize("style", ["json", "console"])
def test_tracebacks_show_no_local_variables(style: str) -> None:
    """An exception is logged with its traceback but without the values, which may be prompts."""

    def fail(prompt: str) -> None:
        raise ZeroDivisionError(len(prompt))

    stream = io.StringIO()
    configure_logging("info", style, service="s", process="p", stream=stream)  # type: ignore[arg-type]
    try:
        fail("a secret prompt")
    except ZeroDivisionError:
        structlog.get_logger().exception("failed")
        logging.getLogger("library").exception("failed too")
    told = stream.getvalue()
    assert told.count("ZeroDivisionError: 15") == 2
    assert "in fail" in told
    assert "prompt: " not in told
    assert "prompt = " not in told


def test_auto_is_for_people_on_a_terminal_and_json_elsewhere() -> None:
    """`auto` looks at the stream; `console` lines carry the same facts."""
    terminal, pipe = Terminal(), io.StringIO()
    for stream in (terminal, pipe):
        configure_logging("info", "auto", service="kitchen", process="kitchen-1", stream=stream)
        structlog.get_logger().info("dish_served")
    assert json.loads(pipe.getvalue())["event"] == "dish_served"
    assert "dish_served" in terminal.getvalue()
    assert "kitchen-1" in terminal.getvalue()
    assert "{" not in terminal.getvalue()


def test_events_go_to_standard_output_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a stream, events are on stdout: stderr is for what ends the process."""
    configure_logging("info", "json", service="s", process="p")
    structlog.get_logger().info("here")
    out, err = capsys.readouterr()
    assert json.loads(out)["event"] == "here"
    assert not err
