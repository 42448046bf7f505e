"""`mell events` against a scripted frontend: what is asked, what is shown, what is missing, the exit codes."""

import json
from datetime import UTC, datetime
from urllib.parse import parse_qs, urlsplit

import pytest

from mell_console.admin import events as events_command
from mell_shared.events.data import GpusWanted
from mell_shared.events.envelope import enclosed
from tests.console.answering import answering
from tests.console.test_admin import mell, words


def sent(*numbers: int, source: str = "/mell/scheduler/s-1", end: bool = True) -> bytes:
    """The body of a frontend's answer: these events of one source, as server-sent events."""
    parts = []
    for number in numbers:
        event = enclosed(GpusWanted(model="m", gpus=number), source, number, datetime(2026, 1, 2, tzinfo=UTC))
        parts.append(f"id: {number + 100}\nevent: gpus.wanted\ndata: {event.model_dump_json(exclude_none=True)}\n\n")
    return ("".join(parts) + (": end\n\n" if end else "")).encode()


def asked(path: str) -> dict[str, str]:
    """The query of a request."""
    return {name: values[0] for name, values in parse_qs(urlsplit(path).query).items()}


def test_events_are_lines_and_a_hole_is_shown() -> None:
    """The type, what it is about, its facts; what is missing stands where it is missing."""
    with answering(200, sent(1, 2, 5)) as (url, seen):
        code, out, _ = mell("events", "--url", url, "--admin-key", "k", "--last", "7")
    assert code == 0
    assert asked(seen[0]["path"]) == {"follow": "false", "type": "*", "last": "7"}
    assert seen[0]["authorization"] == "Bearer k"
    lines = [line.partition(" ")[2] if "gpus" in line else line for line in words(out)]
    assert lines == [
        "gpus.wanted m gpus=1 (s-1 1)",
        "gpus.wanted m gpus=2 (s-1 2)",
        "2 events of /mell/scheduler/s-1 are missing",
        "gpus.wanted m gpus=5 (s-1 5)",
    ]


def test_what_a_line_has_no_room_for_is_left_out_whole() -> None:
    """And said to be; `--json` has it."""
    facts = {f"fact{number}": 1_000_000 + number for number in range(20)}
    event = enclosed(GpusWanted(model="m", gpus=1), "/mell/scheduler/s-1", 1, datetime(2026, 1, 2, tzinfo=UTC))
    told = events_command.line_of(event.model_copy(update={"data": facts}))
    assert "fact10=1000010 ... (s-1 1)" in told
    assert "fact11" not in told


def test_json_is_cloudevents_one_a_line() -> None:
    """For programs; the type that was asked for is passed on, and holes are theirs to see."""
    with answering(200, sent(3, 9)) as (url, seen):
        code, out, _ = mell("events", "--url", url, "--json", "--type", "gpus.*")
    assert code == 0
    assert asked(seen[0]["path"])["type"] == "gpus.*"
    assert [json.loads(line)["sequence"] for line in out.splitlines()] == ["3", "9"]


def test_who_follows_goes_on_where_the_connection_broke(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next question is for what comes after the last event seen; nothing is shown twice; in the end it gives up."""
    monkeypatch.setattr(events_command, "_AGAIN_S", 0.0)
    monkeypatch.setattr(events_command, "_PATIENCE_S", 0.0)
    with answering(200, sent(1, 2), sent(3), b'data: {"error": {"message": "the broker is gone"}}\n\n') as (url, seen):
        code, out, errors = mell("events", "--follow", "--json", "--url", url)
    assert code == 1
    assert [json.loads(line)["sequence"] for line in out.splitlines()] == ["1", "2", "3"]
    assert [asked(request["path"]).get("after") for request in seen[:3]] == [None, "102", "103"]
    assert errors == "mell: the broker is gone\n"


def test_who_follows_what_is_rare_goes_on_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the wanted type has been seen, but how far the stream was: what came meanwhile is asked for."""
    monkeypatch.setattr(events_command, "_AGAIN_S", 0.0)
    monkeypatch.setattr(events_command, "_PATIENCE_S", 0.0)
    quiet, gone = b"id: 40\n\nid: 57\n: nothing new\n\n", b'data: {"error": {"message": "the broker is gone"}}\n\n'
    with answering(200, quiet, gone) as (url, seen):
        code, out, _ = mell("events", "--follow", "--json", "--type", "worker.lost", "--url", url)
    assert (code, out) == (1, "")
    assert [asked(request["path"]).get("after") for request in seen[:2]] == [None, "57"]


@pytest.mark.parametrize(
    ("code", "body", "said"),
    [
        (503, b'{"error": {"message": "This frontend has no events."}}', "This frontend has no events."),
        (401, b'{"error": {"message": "Wrong key."}}', "Wrong key. (here: --admin-key or MELL_ADMIN_KEY)"),
        (200, b"data: {}\n\n", "answers, but not as a Mell frontend does"),
    ],
)
def test_what_goes_wrong_is_one_line_and_code_one(code: int, body: bytes, said: str) -> None:
    """As with every command."""
    with answering(code, body) as (url, _):
        exit_code, _, errors = mell("events", "--url", url)
    assert exit_code == 1
    assert said in errors
    assert errors.count("\n") == 1


def test_a_frontend_that_is_not_there_is_told() -> None:
    """Also when following: nothing was seen yet, so nothing is waited for."""
    code, _, errors = mell("events", "--follow", "--url", "http://127.0.0.1:9")
    assert (code, errors.count("\n")) == (1, 1)
    assert "is the stack up?" in errors
