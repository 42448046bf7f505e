"""Real scheduler processes on a real broker: start, serve, fail over, stop, and say what is wrong."""

import asyncio
import json
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mell_shared.bus import BusClosedError, NoResponderError, RequestTimeoutError
from mell_shared.messages.scheduler import PlaceReply
from mell_shared.nats_bus import NatsBus
from mell_shared.nats_server import NatsServer
from mell_shared.subjects import Subjects
from tests.conftest import BusFactory
from tests.ports import free_port
from tests.scheduler.script import place_request, placed
from tests.scheduler.stage import SUBJECTS, ScriptedWorker, place, status

pytestmark = pytest.mark.connected
WAIT_S = 60.0
"""Ends only a test that has failed."""
NO_JETSTREAM = "authorization { user: a, password: b }\njetstream: disabled\n"

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(nats_server: NatsServer) -> Iterator[Start]:
    """Start scheduler processes; they are killed at the end."""
    processes: list[subprocess.Popen[str]] = []

    def run(*flags: str, url: str = nats_server.url) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "mell_scheduler", "--nats-url", url, "--log-format", "json", *flags]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        processes.append(process)
        return process

    yield run
    for process in processes:
        process.kill()
        process.communicate(timeout=WAIT_S)


def ready(process: subprocess.Popen[str]) -> dict[str, object]:
    """Read the log up to `ready`; returns that line."""
    assert process.stdout is not None
    for line in process.stdout:
        event: dict[str, object] = json.loads(line)
        if event["event"] == "ready":
            return event
    raise AssertionError(f"no ready line: {process.stderr.read() if process.stderr else ''}")


async def placed_in_the_end(bus: NatsBus, sequence: str, subjects: Subjects) -> PlaceReply:
    """Ask until a scheduler answers that there is a place, as a frontend would."""
    async with asyncio.timeout(WAIT_S):
        while True:
            try:
                reply = await place(bus, place_request(sequence), subjects)
            except (NoResponderError, RequestTimeoutError, BusClosedError):
                await asyncio.sleep(0.1)
                continue
            if reply.kind == "placed":
                return reply


async def nobody_answers(bus: NatsBus, subjects: Subjects) -> None:
    """Ask until the broker knows that no scheduler is left."""
    async with asyncio.timeout(WAIT_S):
        while True:
            try:
                await place(bus, place_request("nobody's"), subjects)
            except NoResponderError:
                return
            except RequestTimeoutError:
                continue


async def test_a_killed_leader_is_replaced(start: Start, connect_bus: BusFactory) -> None:
    """With the leader gone without a word, the standby takes over and finds the workers."""
    subjects = Subjects(f"t{secrets.token_hex(4)}")
    flags = ("--subject-prefix", subjects.prefix)
    leader = start(*flags)
    leads = await asyncio.to_thread(ready, leader)
    standby = start(*flags)
    assert (await asyncio.to_thread(ready, standby))["role"] == "standby"
    bus = await connect_bus()
    async with asyncio.TaskGroup() as group:
        worker = group.create_task(ScriptedWorker(bus, "w1", subjects).run())
        assert await placed_in_the_end(bus, "s1", subjects) == placed("w1")
        assert (await status(bus, subjects)).scheduler == leads["id"]
        leader.kill()
        assert await placed_in_the_end(bus, "s2", subjects) == placed("w1")
        assert (await status(bus, subjects)).scheduler != leads["id"]
        standby.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(standby.wait, WAIT_S) == 0
        await nobody_answers(bus, subjects)
        worker.cancel()


async def test_a_broker_that_crashes_is_survived(start: Start, tmp_path: Path) -> None:
    """After its return the scheduler leads again, finds the workers and places, without being restarted."""
    with NatsServer(tmp_path) as server:
        process = start(url=server.url)
        await asyncio.to_thread(ready, process)
        bus = await NatsBus.connect(server.url)
        worker = ScriptedWorker(bus, "w1", SUBJECTS)
        async with asyncio.TaskGroup() as group:
            running = group.create_task(worker.run())
            assert await placed_in_the_end(bus, "s1", SUBJECTS) == placed("w1")
            server.kill()
            await asyncio.to_thread(server.start)
            assert await placed_in_the_end(bus, "s2", SUBJECTS) == placed("w1")
            assert process.poll() is None
            running.cancel()
        await bus.close()
        process.terminate()
        assert await asyncio.to_thread(process.wait, WAIT_S) == 0


async def test_one_scheduler_without_a_lease(start: Start, tmp_path: Path) -> None:
    """`--lease off` needs no JetStream and leads at once; Ctrl-C is a clean stop."""
    with NatsServer(tmp_path, access=NO_JETSTREAM) as server:
        url = f"nats://a:b@{server.address}"
        process = start("--lease", "off", url=url)
        assert (await asyncio.to_thread(ready, process))["role"] == "leader"
        bus = await NatsBus.connect(url)
        assert (await status(bus)).policy == "repack"
        await bus.close()
        process.send_signal(signal.SIGINT)
        assert await asyncio.to_thread(process.wait, WAIT_S) == 0


def test_a_broker_without_jetstream_is_said_so(start: Start, tmp_path: Path) -> None:
    """One line names both ways out."""
    with NatsServer(tmp_path, access=NO_JETSTREAM) as server:
        error = failure(start(url=f"nats://a:b@{server.address}"))
    assert "-js" in error
    assert "--lease off" in error


def test_an_unreachable_broker_is_said_so(start: Start) -> None:
    """One line names the address and the setting."""
    error = failure(start(url=f"nats://127.0.0.1:{free_port()}"))
    assert "127.0.0.1" in error
    assert "MELL_NATS_URL" in error


def test_a_wrong_setting_is_said_so(start: Start) -> None:
    """One line names the flag, and nothing is started."""
    assert "--policy" in failure(start("--policy", "worst"), code=2)


def test_an_event_log_that_cannot_be_written_is_said_so(start: Start, tmp_path: Path) -> None:
    """A folder that does not exist is found at start."""
    error = failure(start("--lease", "off", "--event-log", str(tmp_path / "none" / "log.jsonl")))
    assert "MELL_EVENT_LOG" in error


def failure(process: subprocess.Popen[str], code: int = 1) -> str:
    """The one line on stderr of a process that could not start."""
    _, error = process.communicate(timeout=WAIT_S)
    assert process.returncode == code
    assert error.count("\n") == 1, error
    return error
