import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest
from typer.testing import CliRunner

from mell_console.cli import app
from mell_console.get import GetError, get_json

STATUS: dict[str, Any] = {
    "kind": "status_reply",
    "scheduler": "scheduler-1",
    "policy": "best-fit",
    "uptime_s": 12.5,
    "queued": 1,
    "placed": 7,
    "rejected": 2,
    "workers": [
        {
            "worker": f"worker-{number}-x",
            "name": f"worker-{number}",
            "host": "here",
            "model": "m",
            "engine": "torch",
            "device": "cpu",
            "state": state,
            "kv_blocks": 200,
            "used_blocks": 50,
            "block_tokens": 16,
            "running": 3,
            "waiting": 1,
            "step_us": step_us,
            "report_age_s": 0.25,
        }
        for number, state, step_us in ((2, "silent", 0), (1, "active", 12_340))
    ],
}


@contextmanager
def answering(code: int, body: bytes) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Run a server that answers every GET so; give its URL and the requests it saw."""
    seen: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append({"path": self.path, **{name.lower(): value for name, value in self.headers.items()}})
            self.send_response(code)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", seen
        finally:
            server.shutdown()
            thread.join()


def status(*arguments: str) -> tuple[int, str]:
    """Return the exit code and output of `mell status`."""
    result = CliRunner().invoke(app, ["status", *arguments])
    return result.exit_code, result.output


def test_workers_are_shown_by_name_with_what_they_hold() -> None:
    """The table has each worker's state, KV use and step time; the headline the scheduler's counts."""
    with answering(200, json.dumps(STATUS).encode()) as (url, seen):
        code, text = status("--url", f"{url}/v1/", "--api-key", "k")
    assert code == 0
    assert (seen[0]["path"], seen[0]["authorization"]) == ("/admin/status", "Bearer k")
    headline, _, first, second = text.splitlines()
    assert headline == "scheduler-1 (best-fit) up 12 s: 7 placed, 1 queued, 2 rejected"
    assert " ".join(first.split()) == "worker-1-x m here cpu active 50/200 25% 3 1 12.3 ms 0.2 s"
    assert " ".join(second.split()) == "worker-2-x m here cpu silent 50/200 25% 3 1 0.2 s"


def test_nothing_is_cut_off_where_nobody_looks() -> None:
    """In a pipe, a worker's long id is whole, so that it can be used in the next command."""
    worker = STATUS["workers"][0] | {"worker": "worker-1-" + "f" * 60, "state": "active"}
    with answering(200, json.dumps(STATUS | {"workers": [worker]}).encode()) as (url, _):
        assert worker["worker"] in status("--url", url)[1]


def test_json_is_the_scheduler_s_own_answer() -> None:
    """`--json` prints the message unchanged, for programs."""
    with answering(200, json.dumps(STATUS).encode()) as (url, _):
        code, text = status("--url", url, "--json")
    assert (code, json.loads(text)) == (0, STATUS)


@pytest.mark.parametrize(
    ("code", "body", "words"),
    [
        (503, b'{"error": {"message": "no scheduler answers"}}', "answers 503: no scheduler answers"),
        (404, b"<html>", "answers 404: no message"),
        (200, b"<html>", "no JSON"),
        (200, b'{"kind": "other"}', "not as a Mell frontend does"),
    ],
)
def test_what_is_no_status_is_one_line(code: int, body: bytes, words: str) -> None:
    """A wrong server, or a stack that is not whole, is told with code 1."""
    with answering(code, body) as (url, _):
        exit_code, text = status("--url", url)
    assert exit_code == 1
    assert words in text
    assert len(text.splitlines()) == 1


def test_nobody_there_says_how_to_start() -> None:
    """A refused connection names `mell up`."""
    code, text = status("--url", "http://127.0.0.1:1")
    assert code == 1
    assert "Connection refused" in text
    assert "mell up" in text


def test_only_http_is_asked() -> None:
    """A file URL is refused rather than read."""
    with pytest.raises(GetError, match="no http address"):
        get_json("file:///etc/passwd")
