import io
import itertools
import json
import os
import re
import shlex
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from mell_console.get import GetError
from mell_console.up import probe
from mell_console.up.greeting import curl_line, python_snippet
from mell_console.up.ports import public_url, take_port
from mell_console.up.runfolder import make_run_folder
from mell_console.up.screen import PlainScreen, TerminalScreen, make_screen
from mell_console.up.stack import describe_ready
from mell_shared.process import StartError
from tests.ports import free_port


@pytest.mark.parametrize("key", ["", "it's a key"])
def test_the_curl_line_is_one_shell_command_with_a_valid_body(key: str) -> None:
    """Copied into a shell it asks the right URL for a stream, with the key if there is one."""
    line = curl_line("http://127.0.0.1:1", "o'model", key)
    words = shlex.split(line)
    assert "\n" not in line
    assert words[:3] == ["curl", "-N", "http://127.0.0.1:1/v1/chat/completions"]
    body = json.loads(words[words.index("-d") + 1])
    assert (body["model"], body["stream"]) == ("o'model", True)
    assert (f"authorization: Bearer {key}" in words) == bool(key)


def test_the_snippet_is_python_that_streams(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copied into a file it runs as it is, prints the pieces, and copes with chunks without choices' content."""
    seen: dict[str, object] = {}

    def chunk(text: str | None) -> SimpleNamespace:
        return SimpleNamespace(choices=[SimpleNamespace(delta=SimpleNamespace(content=text))])

    def create(**arguments: object) -> list[SimpleNamespace]:
        seen.update(arguments)
        return [chunk("Green "), chunk(None), chunk("cheese")]

    def client(**arguments: object) -> SimpleNamespace:
        seen.update(arguments)
        return SimpleNamespace(chat=SimpleNamespace(completions=SimpleNamespace(create=create)))

    monkeypatch.setattr("openai.OpenAI", client)
    exec(python_snippet("http://127.0.0.1:1", "it's", ""), {})
    assert capsys.readouterr().out == "Green cheese"
    assert (seen["base_url"], seen["api_key"], seen["model"]) == ("http://127.0.0.1:1/v1", "none", "it's")


def test_a_free_port_is_chosen_and_a_given_one_is_kept() -> None:
    """Port 0 becomes a real one; another stays as it is if nobody has it."""
    assert take_port("127.0.0.1", 0) > 0
    port = free_port()
    assert take_port("127.0.0.1", port) == port


@pytest.mark.parametrize(
    ("host", "words"),
    [("127.0.0.1", "is taken"), ("8.8.8.8", "no address of this machine"), ("no.such.invalid", "--host")],
)
def test_a_port_that_cannot_be_had_says_what_to_do(host: str, words: str) -> None:
    """Taken ports and foreign addresses are told before anything starts."""
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(StartError, match=words):
        take_port(host, taken.getsockname()[1])


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("::", "http://[::1]:80"),
        ("::1", "http://[::1]:80"),
        ("name", "http://name:80"),
    ],
)
def test_the_url_is_one_that_works_from_here(host: str, url: str) -> None:
    """Listening everywhere still prints an address that a client can use."""
    assert public_url(host, 80) == url


def test_runs_have_folders_of_their_own_and_old_ones_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten runs are kept; one whose process still lives is never removed."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    runs = tmp_path / "mell" / "runs"
    living = runs / f"20000101-000000-{os.getppid()}"
    for folder in [living, *(runs / f"20000102-0000{number:02}-{1 << 30}" for number in range(12))]:
        folder.mkdir(parents=True)
    made = make_run_folder("")
    kept = sorted(runs.iterdir())
    assert made in kept
    assert living in kept
    assert len(kept) == 11


def test_a_named_log_folder_is_used_as_it_is(tmp_path: Path) -> None:
    """`--log-dir` is made if need be and nothing in it is removed."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "old.log").touch()
    assert make_run_folder(str(tmp_path / "logs")) == tmp_path / "logs"
    assert (tmp_path / "logs" / "old.log").exists()
    assert make_run_folder(str(tmp_path / "new" / "deep")).is_dir()


def test_without_a_terminal_each_step_is_a_plain_line() -> None:
    """No escapes, no spinner: a step's outcome and time, and marked warnings."""
    out = io.StringIO()
    screen = make_screen(Console(file=out, width=20))
    assert isinstance(screen, PlainScreen)
    screen.begin("broker")
    screen.update("broker", "half")
    screen.end("broker", "a detail that is longer than the line")
    screen.say("worker-1: [odd] text", "warning")
    screen.say("plain")
    screen.close()
    lines = out.getvalue().splitlines()
    assert re.fullmatch(r"broker: a detail that is longer than the line \(\d+\.\d s\)", lines[0])
    assert lines[1:] == ["warning: worker-1: [odd] text", "plain"]


def test_on_a_terminal_steps_are_drawn_and_ticked() -> None:
    """Each step ends with a tick and its detail; markup in texts is shown, not obeyed."""
    out = io.StringIO()
    screen = make_screen(Console(file=out, width=100, force_terminal=True))
    assert isinstance(screen, TerminalScreen)
    screen.begin("worker-1")
    screen.update("worker-1", "loading")
    screen.say("a [bold]note", "error")
    screen.end("worker-1", "done [x]")
    screen.close()
    screen.close()
    text = out.getvalue()
    assert "✓" in text
    assert "done [x]" in text
    assert "a [bold]note" in text


def test_ready_events_are_described_by_what_they_say() -> None:
    """Known fields are shown, lists joined; an event without any still says something."""
    assert (
        describe_ready({"model": "m", "engine": "fake", "device": "cpu", "kv_blocks": 8}) == "m, fake, cpu, 8 KV blocks"
    )
    assert describe_ready({"models": ["a", "b"], "url": "http://x"}) == "a, b, http://x"
    assert describe_ready({}) == "ready"


async def test_the_stack_is_up_when_the_scheduler_knows_all_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not ready, unknown and silent workers are waited for."""
    answers = iter(
        [
            GetError("refused"),
            {"status": "ready"},
            {"workers": []},
            {"status": "ready"},
            {"workers": [{"state": "active"}, {"state": "silent"}]},
            {"status": "ready"},
            {"workers": [{"state": "active"}, {"state": "standby"}]},
        ]
    )

    def get(*_: object, **__: object) -> object:
        answer = next(answers)
        if isinstance(answer, GetError):
            raise answer
        return answer

    monkeypatch.setattr(probe, "get_json", get)
    monkeypatch.setattr(probe, "_POLL_S", 0.001)
    await probe.await_workers("http://x", "", 2, time.monotonic() + 60)
    assert next(answers, None) is None


async def test_services_that_never_meet_are_a_start_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing is named when the time is up: here a second with each look at the clock."""
    seconds = itertools.count()
    monkeypatch.setattr(probe, "time", SimpleNamespace(monotonic=lambda: float(next(seconds))))
    monkeypatch.setattr(probe, "get_json", lambda *_, **__: {"workers": []})
    monkeypatch.setattr(probe, "_POLL_S", 0.001)
    with pytest.raises(StartError, match="0 of 2 workers"):
        await probe.await_workers("http://x", "", 2, deadline_s=3.0)
    assert next(seconds) == 4
