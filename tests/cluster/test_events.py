"""Events through real processes with their permissions: scheduler, frontend, worker, the console and both examples."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest

from mell_shared.process import death_with_parent
from tests.cluster.stack import Service, Stack, StreamedChat, eventually, whole_text
from tests.cluster.test_permissions import shipped_access

pytestmark = pytest.mark.connected

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A broker with the shipped permissions, a scheduler and two workers."""
    with Stack(tmp_path_factory.mktemp("events"), access=shipped_access()) as stack:
        for module, role in (("mell_frontend", "frontend"), ("mell_scheduler", "scheduler")):
            stack.log_in(module, f"{role}:{role}-pw")
        stack.log_in("mell_gpu_worker", "worker:worker-pw")
        # Without a lease: each time that a scheduler leads anew it is a new source.
        scheduler = stack.start_scheduler("--lease", "off")
        services = [scheduler, *(stack.start_worker(name, step_us=40_000) for name in ("one", "two"))]
        for service in services:
            service.ready()
        yield stack


@pytest.fixture(scope="module")
def frontend(stack: Stack) -> Service:
    """A frontend that is ready."""
    service = stack.start_frontend()
    service.ready()
    return service


@contextmanager
def program(stack: Stack, name: str, log: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run an example as the broker's user for other systems, until the context ends."""
    url = f"nats://events:events-pw@{stack.broker.address}"
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, EXAMPLES / name, "--nats", url, *arguments],
            env=dict(os.environ),
            stdout=file,
            stderr=subprocess.STDOUT,
            preexec_fn=death_with_parent(signal.SIGKILL),  # noqa: PLW1509 - one system call, allocates nothing
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(60) == 0, log.read_text()
        finally:
            process.kill()


def events(client: httpx.Client, query: str = "last=10000") -> list[dict[str, Any]]:
    """The events that an operator reads."""
    lines = client.get(f"/admin/events?{query}").text.splitlines()
    return [json.loads(line[6:]) for line in lines if line.startswith("data: ")]


def told(client: httpx.Client, request_id: str) -> dict[str, dict[str, Any]]:
    """What was told of a request so far: the last event of each type."""
    return {event["type"]: event for event in events(client) if event["data"].get("request_id") == request_id}


def joined(client: httpx.Client) -> int:
    """How many workers are told to have joined."""
    return [event["type"] for event in events(client)].count("worker.joined")


def test_a_request_that_moves_is_told_by_who_knows_it(stack: Stack, frontend: Service) -> None:
    """Arrived and finished by the frontend, placed and moved by the scheduler, each under one id."""
    with stack.client(frontend) as client:
        client.headers["x-request-id"] = "moved-one"
        stream = StreamedChat(client, 3_000)
        stream.read(20)
        placed = eventually(lambda: told(client, "moved-one").get("request.placed"), "placed is told")
        there = placed["data"]["worker"]
        other = eventually(
            lambda: [w["worker"] for w in client.get("/admin/status").json()["workers"] if w["worker"] != there],
            "the other worker is known",
        )[0]
        moved = client.post("/admin/requests/moved-one/migrate", json={"to": other})
        assert moved.status_code == 200, moved.text
        stream.leave()
        of = eventually(
            lambda: (found := told(client, "moved-one")) and len(found) == 4 and found, "four types of events"
        )
        assert set(of) == {"request.arrived", "request.placed", "request.migrated", "request.finished"}
        migrated = of["request.migrated"]["data"]
        assert (migrated["source"], migrated["target"], migrated["cause"]) == (there, other, "manual")
        finished = of["request.finished"]["data"]
        assert finished["completion_tokens"] >= 20
        assert finished["outcome"] == "client_gone"
        assert {event["source"].split("/")[2] for event in of.values()} == {"frontend", "scheduler"}
        assert stream.text[:30] not in json.dumps(events(client))


def test_every_source_counts_without_holes_from_its_state_on(stack: Stack, frontend: Service) -> None:
    """From 1, in order; number 1 says how things stand; all workers are told of."""
    with stack.client(frontend) as client:
        client.headers["x-request-id"] = "counted"
        whole_text(client, 5)
        finished = eventually(lambda: told(client, "counted").get("request.finished"), "an end is told")["data"]
        assert (finished["completion_tokens"], finished["outcome"]) == (5, "complete")
        eventually(lambda: joined(client) == 2, "both workers are told")
        found = events(client)
    by_source: dict[str, list[dict[str, Any]]] = {}
    for event in found:
        by_source.setdefault(event["source"], []).append(event)
    assert len(by_source) == 2
    for own in by_source.values():
        assert [int(event["sequence"]) for event in own] == list(range(1, len(own) + 1))
        assert own[0]["type"].endswith(".state")


def test_the_console_shows_them(stack: Stack, frontend: Service) -> None:
    """`mell events` prints lines, or JSON for programs; with `--follow` until Ctrl-C, which is no failure."""
    with stack.client(frontend) as client:
        whole_text(client, 5)
        eventually(lambda: joined(client) == 2, "both workers are told")
        url = str(client.base_url)
    mell = [sys.executable, "-m", "mell_console", "events", "--url", url]
    shown = subprocess.run(
        [*mell, "--type", "worker.joined", "--last", "9999"], capture_output=True, text=True, check=True, timeout=60
    )
    assert shown.stdout.count("worker.joined") == 2
    listed = subprocess.run([*mell, "--json", "--last", "3"], capture_output=True, text=True, check=True, timeout=60)
    assert {json.loads(line)["specversion"] for line in listed.stdout.splitlines()} == {"1.0"}
    with subprocess.Popen([*mell, "--follow", "--json", "--last", "1"], stdout=subprocess.PIPE, text=True) as following:
        assert following.stdout is not None
        json.loads(following.stdout.readline())
        with stack.client(frontend) as client:
            client.headers["x-request-id"] = "followed"
            whole_text(client, 5)
        while json.loads(following.stdout.readline())["data"].get("request_id") != "followed":
            pass
        following.send_signal(signal.SIGINT)
        following.stdout.read()
        assert following.wait(60) == 0


def test_the_watching_example_prints_what_happens(stack: Stack, frontend: Service, tmp_path: Path) -> None:
    """With the permissions of other systems, and nothing is missing."""
    log = tmp_path / "watch.log"
    with program(stack, "watch_events.py", log, "--last-hour"):
        eventually(lambda: "worker.joined" in log.read_text(), "past events are printed")
        with stack.client(frontend) as client:
            client.headers["x-request-id"] = "watched"
            whole_text(client, 5)
        eventually(
            lambda: [line for line in log.read_text().splitlines() if "request.finished" in line and "watched" in line],
            "the end of a request is printed",
        )
    assert "missing" not in log.read_text()


class Hook(ThreadingHTTPServer):
    """A webhook that takes events, or refuses as many as it is told first."""

    def __init__(self) -> None:
        self.taken: list[dict[str, Any]] = []
        self.refuse = 0
        self.refused = 0
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                event = json.loads(self.rfile.read(int(self.headers["content-length"])))
                assert self.headers["content-type"] == "application/cloudevents+json"
                if hook.refuse:
                    hook.refuse -= 1
                    hook.refused += 1
                    self.send_response(503)
                else:
                    hook.taken.append(event)
                    self.send_response(204)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def names(self) -> list[tuple[str, str]]:
        """Source and number of what was taken."""
        return [(event["source"], event["sequence"]) for event in self.taken]


@pytest.fixture
def hook() -> Iterator[Hook]:
    """A running webhook."""
    with Hook() as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_the_forwarding_example_delivers_in_order_across_refusals_and_restarts(
    stack: Stack, frontend: Service, tmp_path: Path, hook: Hook
) -> None:
    """What is refused is tried again before anything else; a new start goes on where the last one stopped."""
    log = tmp_path / "forward.log"
    arguments = (f"http://127.0.0.1:{hook.server_port}/hook", "--first-pause", "0.05")
    hook.refuse = 3
    with stack.client(frontend) as client:
        with program(stack, "forward_events.py", log, *arguments):
            eventually(lambda: len(hook.taken) >= 3, "events are forwarded")
        assert hook.refused == 3
        assert "answers 503" in log.read_text()
        client.headers["x-request-id"] = "forwarded"
        whole_text(client, 5)
        with program(stack, "forward_events.py", log, *arguments):
            eventually(
                lambda: any(
                    event["type"] == "request.finished" and event["data"]["request_id"] == "forwarded"
                    for event in list(hook.taken)
                ),
                "the end of a request is forwarded",
            )
        expected = [(event["source"], event["sequence"]) for event in events(client)]
    assert list(dict.fromkeys(hook.names)) == expected[: len(set(hook.names))]
