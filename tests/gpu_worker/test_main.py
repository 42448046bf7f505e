import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from mell_gpu_worker.engine.fake import expected_output
from mell_gpu_worker.settings import WorkerSettings
from mell_shared.messages.scheduler import WorkerLeft
from mell_shared.messages.worker import SubmitAccepted
from mell_shared.nats_bus import NatsBus
from mell_shared.nats_server import NatsServer

from .core.worlds import submit
from .streaming import SUBJECTS, SmallFrontend

FAKE = ("--engine", "fake", "--subject-prefix", SUBJECTS.prefix, "--log-format", "json")


WORKER = ("-m", "mell_gpu_worker")
SLOW_TO_LOAD = """
import sys, time
import mell_gpu_worker.__main__ as worker
def load(options):
    print('{"event": "loading"}', flush=True)
    time.sleep(600)
worker.make_engine = load
worker.main(sys.argv[1:])
"""


@asynccontextmanager
async def worker_process(
    *arguments: str, program: tuple[str, ...] = WORKER
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A worker in a process of its own, dead when the context ends."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, *program, *arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def logged(process: asyncio.subprocess.Process, event: str) -> dict[str, object]:
    """The first log line of this event."""
    assert process.stdout is not None
    async with asyncio.timeout(60):
        while line := await process.stdout.readline():
            entry: dict[str, object] = json.loads(line)
            if entry["event"] == event:
                return entry
    raise AssertionError(f"the process never logged {event}")


async def exit_of(process: asyncio.subprocess.Process) -> tuple[int, list[str]]:
    """Exit code and lines on stderr."""
    async with asyncio.timeout(60):
        _, errors = await process.communicate()
    assert process.returncode is not None
    return process.returncode, errors.decode().splitlines()


@pytest.mark.connected
async def test_a_worker_process_serves_and_stops_cleanly(
    nats_server: NatsServer, connect_bus: Callable[[], Awaitable[NatsBus]]
) -> None:
    """It logs `ready`, streams, finishes on SIGTERM what runs, says goodbye and exits 0."""
    frontend = SmallFrontend(await connect_bus())
    await frontend.start()
    arguments = ("--fake-step-us", "2000", "--worker-name", "gpu 0", "--served-model-name", "demo")
    async with worker_process(*FAKE, "--nats-url", nats_server.url, *arguments) as process:
        ready = await logged(process, "ready")
        worker = await frontend.worker()
        assert (ready["worker"], ready["model"], ready["service"]) == (worker, "demo", "gpu_worker")
        assert worker.startswith("gpu-0-")
        message = submit("a", model="demo", max_tokens=150)
        assert isinstance(await frontend.submit(worker, message), SubmitAccepted)
        process.send_signal(signal.SIGTERM)
        await frontend.finished("a")
        assert frontend.streams["a"].tokens == expected_output(b"hello", message.sampling, 150)
        assert await exit_of(process) == (0, [])
    await frontend.until(lambda: frontend.events[-1] == WorkerLeft(worker=worker, reason="stopped"))


@pytest.mark.connected
async def test_at_the_stop_deadline_a_process_gives_the_rest_back(
    nats_server: NatsServer, connect_bus: Callable[[], Awaitable[NatsBus]]
) -> None:
    """The frontend gets every token that was made, and the exit is still clean."""
    frontend = SmallFrontend(await connect_bus(), "f9")
    await frontend.start()
    slow = ("--fake-step-us", "20000", "--stop-deadline-s", "0.2")
    async with worker_process(*FAKE, "--nats-url", nats_server.url, *slow) as process:
        worker = await frontend.worker()
        message = submit("a", frontend="f9", max_tokens=10_000)
        await frontend.submit(worker, message)
        await frontend.until(lambda: len(frontend.streams["a"].tokens) > 2)
        process.send_signal(signal.SIGINT)
        assert await exit_of(process) == (0, [])
    evicted, *repeated = frontend.evicted
    assert all(again == evicted for again in repeated)
    assert (evicted.worker, evicted.sequence) == (worker, "a")
    assert evicted.output_ids == expected_output(b"hello", message.sampling, len(evicted.output_ids))
    assert len(evicted.output_ids) >= len(frontend.streams["a"].tokens)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--nats-url", "nats://127.0.0.1:1"), 1, "MELL_NATS_URL"),
        (("--max-step-tokens", "4"), 2, "max_sequences"),
        (("--kv-blocks", "-1"), 2, "--kv-blocks"),
        (("--no-such-flag",), 2, "--help"),
    ],
)
async def test_a_start_that_cannot_succeed_says_why_in_one_line(
    arguments: tuple[str, ...], code: int, words: str
) -> None:
    """One line that says what to do, and an exit code that is not 0."""
    async with worker_process("--engine", "fake", *arguments) as process:
        returned, lines = await exit_of(process)
    assert returned == code
    assert len(lines) == 1
    assert words in lines[0]


async def test_an_engine_that_cannot_be_built_says_why_in_one_line(nats_server: NatsServer) -> None:
    """Wrong device: the engine's own reason, exit code 1."""
    async with worker_process(*FAKE, "--nats-url", nats_server.url, "--device", "cuda") as process:
        returned, lines = await exit_of(process)
    assert returned == 1
    assert len(lines) == 1
    assert "the fake engine runs on the CPU" in lines[0]


@pytest.mark.connected
async def test_a_worker_whose_broker_died_still_stops_cleanly(tmp_path: Path) -> None:
    """Nobody can be told anything; it notices, waits no longer than it would for silent frontends, and exits 0."""
    with NatsServer(tmp_path) as server:
        frontend = SmallFrontend(await NatsBus.connect(server.url))
        await frontend.start()
        slow = ("--fake-step-us", "20000", "--stop-deadline-s", "0.2")
        async with worker_process(*FAKE, "--nats-url", server.url, *slow) as process:
            await frontend.submit(await frontend.worker(), submit("a", max_tokens=10_000))
            server.kill()
            await logged(process, "connection_lost")
            process.send_signal(signal.SIGTERM)
            assert await exit_of(process) == (0, [])
        await frontend.bus.close()


async def test_a_worker_told_to_stop_while_it_loads_does_stop(nats_server: NatsServer) -> None:
    """Loading may take minutes; SIGTERM ends it at once, with exit code 0."""
    async with worker_process(*FAKE, "--nats-url", nats_server.url, program=("-c", SLOW_TO_LOAD)) as process:
        await logged(process, "loading")
        process.send_signal(signal.SIGTERM)
        assert await exit_of(process) == (0, [])


def test_the_fake_engine_serves_the_fake_model_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--engine fake` alone is enough; a name may be given for clients."""
    monkeypatch.delenv("MELL_MODEL", raising=False)
    settings = WorkerSettings.from_command_line(["--engine", "fake"])
    assert (settings.model, settings.public_model) == ("fake", "fake")
    named = WorkerSettings.from_command_line(["--engine", "fake", "--served-model-name", "demo"])
    assert (named.model, named.public_model) == ("fake", "demo")


def test_the_prefix_cache_is_a_flag_with_a_no() -> None:
    """On unless switched off."""
    assert WorkerSettings.from_command_line(["--engine", "fake"]).prefix_cache
    assert not WorkerSettings.from_command_line(["--engine", "fake", "--no-prefix-cache"]).prefix_cache


def test_engine_options_are_the_settings_of_the_same_name() -> None:
    """The engine sees what was set, and nothing of the rest."""
    settings = WorkerSettings.from_command_line(["--engine", "fake", "--kv-blocks", "7", "--model-dir", "/x"])
    options = settings.engine_options
    assert (options.engine, options.model, options.kv_blocks, options.model_dir) == ("fake", "fake", 7, Path("/x"))
