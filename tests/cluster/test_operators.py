"""Operators against real processes: the `mell` command, a frontend's `/admin`, the scheduler, workers in mid-stream."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.cluster.stack import Service, Stack, StreamedChat, eventually, whole_text

pytestmark = pytest.mark.connected

TOKENS = 3_000
"""A stream that outlasts all that is done to it; none is read to its end."""
STORY = 400
"""More of it than any test reads."""
FLAGS = ("--fake-kv-bytes-per-token", "4096", "--lane-probes", "0", "--transport", "tcp")


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A broker, a scheduler, a frontend with an admin key, and two workers."""
    with Stack(tmp_path_factory.mktemp("operators")) as stack:
        stack.start_scheduler().ready()
        yield stack


@pytest.fixture(scope="module")
def frontend(stack: Stack) -> Service:
    """The frontend, which asks operators for a key."""
    service = stack.start_frontend("--admin-key", "secret")
    service.ready()
    return service


@pytest.fixture(scope="module")
def client(stack: Stack, frontend: Service) -> Iterator[httpx.Client]:
    """A client of the frontend."""
    with stack.client(frontend) as client:
        yield client


@pytest.fixture(scope="module")
def story(stack: Stack, client: httpx.Client) -> str:
    """The undisturbed beginning."""
    worker = stack.start_worker("undisturbed", *FLAGS, step_us=200)
    worker.ready()
    text = whole_text(client, STORY)
    worker.ask_to_stop()
    worker.exit_code()
    return text


@pytest.fixture(scope="module")
def workers(stack: Stack, story: str) -> dict[str, Service]:
    """Two workers that can move sequences."""
    started = {name: stack.start_worker(name, *FLAGS, step_us=40_000) for name in ("one", "two")}
    for worker in started.values():
        worker.ready()
    return started


def mell(frontend: Service, *arguments: str) -> tuple[int, Any]:
    """Run a command of an operator; returns its exit code and its JSON."""
    environment = os.environ | {"MELL_URL": frontend.ready()["url"], "MELL_ADMIN_KEY": "secret"}
    command = [sys.executable, "-m", "mell_console", *arguments, "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=90)
    return done.returncode, json.loads(done.stdout) if done.stdout else done.stderr


def holder(frontend: Service, answer: str) -> tuple[str, str]:
    """Wait until the sequence of an answer, by its id, runs; returns its worker's name and its own."""

    def held() -> tuple[str, str] | None:
        _, status = mell(frontend, "status", "--requests")
        own = [row for row in status["sequences"] if row["sequence"].partition(".")[0] == answer]
        running = [row for row in own if row["state"] == "running"]
        return (running[0]["worker"].rpartition("-")[0], running[0]["sequence"]) if running else None

    name, sequence = eventually(held, "the sequence runs")
    return name, sequence


def test_a_worker_is_drained_in_mid_stream(
    client: httpx.Client, frontend: Service, workers: dict[str, Service], story: str
) -> None:
    """Its request goes on elsewhere, to the same text; it stays, empty, until it is undrained; every step is told."""
    chat = StreamedChat(client, TOKENS)
    chat.read(5)
    name, sequence = holder(frontend, chat.id)
    (other,) = set(workers) - {name}
    code, plan = mell(frontend, "drain", name, "--dry-run")
    assert (code, [row["target"].rpartition("-")[0] for row in plan["sequences"]]) == (0, [other])
    code, _ = mell(frontend, "drain", name, "--deadline", "60s", "--wait", "--timeout", "60s")
    assert code == 0
    assert story.startswith(chat.read(len(chat.text) + 20))
    _, status = mell(frontend, "status")
    assert {worker["name"]: worker["state"] for worker in status["workers"]} == {name: "drained", other: "active"}
    code, refusal = mell(frontend, "migrate", sequence, "--to", name)
    assert code == 1
    assert "undrain" in refusal
    assert mell(frontend, "undrain", name)[0] == 0
    code, moved = mell(frontend, "migrate", sequence, "--to", name, "--mode", "tokens")
    assert (code, [move["state"] for move in moved["moves"]]) == (0, ["committed"])
    assert story.startswith(chat.read(len(chat.text) + 20))
    code, told = mell(frontend, "explain", sequence)
    happened = [(h["what"], (h["move"] or {}).get("reason")) for h in told["stories"][0]["happenings"]]
    assert [what for what, _ in happened] == ["placed", "moving", "moved", "moving", "moved"]
    assert [reason for what, reason in happened if what == "moved"] == ["drain", "manual"]
    assert not chat.done, "all this happened in mid-stream"
    chat.leave()


def test_a_worker_that_is_told_to_stop_is_emptied_first(
    client: httpx.Client, frontend: Service, workers: dict[str, Service], story: str
) -> None:
    """As in a rolling restart: its stream moves away, it leaves at once, nothing is placed again."""
    chat = StreamedChat(client, TOKENS)
    chat.read(5)
    name, _ = holder(frontend, chat.id)
    workers[name].ask_to_stop()
    assert workers[name].exit_code() == 0
    assert story.startswith(chat.read(len(chat.text) + 20))
    assert not chat.done, "it left in mid-stream"
    chat.leave()
    assert frontend.events("sequence_placed_again") == []


def test_strangers_steer_nothing(client: httpx.Client, frontend: Service) -> None:
    """Without the key not even from this machine."""
    assert client.post("/admin/moves/pause").status_code == 401
    assert client.get("/admin/status").status_code == 401
    assert client.get("/ready").status_code == 200
