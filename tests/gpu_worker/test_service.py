import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence

import pytest
import structlog
from prometheus_client import CollectorRegistry, generate_latest

from mell_gpu_worker.core.step import StepResult, StepRow
from mell_gpu_worker.engine.base import EngineError
from mell_gpu_worker.engine.factory import make_engine
from mell_gpu_worker.engine.fake import FakeEngine, expected_output
from mell_gpu_worker.settings import WorkerSettings
from mell_shared.bus import Delivery
from mell_shared.clock import SystemClock
from mell_shared.codec import decode, encode
from mell_shared.memory_bus import Faults, MemoryBroker
from mell_shared.messages.frontend import StreamStatus
from mell_shared.messages.sampling import Grammar
from mell_shared.messages.scheduler import SequenceFinished, WorkerJoined, WorkerLeft, WorkerReport
from mell_shared.messages.worker import (
    WORKER_REPLY,
    Cancel,
    CancelDone,
    CommandInvalid,
    Report,
    SubmitAccepted,
    SubmitRefused,
)
from mell_shared.nats_bus import NatsBus
from mell_shared.testing import VirtualTimeLoop, run_virtually

from .core.worlds import submit
from .streaming import SUBJECTS, RunningWorker, SmallFrontend, running_worker, worker_settings

Scene = Callable[[RunningWorker, SmallFrontend], Awaitable[None]]


def play(
    scene: Scene, *, broker: MemoryBroker | None = None, engine: FakeEngine | None = None, **changes: object
) -> None:
    """Run a scene with one worker and one frontend on an in-memory bus, in virtual time."""
    settings = worker_settings(**changes)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualTimeLoop)
        memory = broker or MemoryBroker(seed=1)
        worker_bus, frontend = memory.connect(), SmallFrontend(memory.connect())
        await frontend.start()
        made = engine or make_engine(settings.engine_options)
        async with running_worker(worker_bus, made, loop, settings) as worker:
            assert await frontend.worker() == "w1"
            await scene(worker, frontend)
        await worker_bus.close()
        await frontend.bus.close()

    run_virtually(main())


def wanted(prompt: bytes, count: int, seed: int = 1) -> list[int]:
    """What `submit(prompt=prompt, seed=seed)` must generate."""
    return expected_output(prompt, submit(seed=seed).sampling, count)


def test_a_sequence_from_submission_to_acknowledged_end() -> None:
    """Accepted, streamed, ended; the scheduler hears of it, and the worker forgets it."""

    async def scene(worker: RunningWorker, frontend: SmallFrontend) -> None:
        assert isinstance(await frontend.submit("w1", submit("a", max_tokens=20)), SubmitAccepted)
        await frontend.finished("a")
        assert frontend.streams["a"].tokens == wanted(b"hello", 20)
        await frontend.until(lambda: not len(worker.service.core.streams))
        assert SequenceFinished(worker="w1", sequence="a", generation=1, reason="length") in frontend.events

    play(scene)


@pytest.mark.parametrize("seed", range(6))
def test_every_token_arrives_over_a_bus_that_loses_repeats_and_delays(seed: int) -> None:
    """With a fifth of all messages lost, every stream is complete and right, and nothing is left at the worker."""
    broker = MemoryBroker(seed=seed, faults=Faults(loss=0.2, duplicate=0.1, max_delay_us=50_000))

    async def scene(worker: RunningWorker, frontend: SmallFrontend) -> None:
        names = [f"s{number}" for number in range(12)]
        for number, name in enumerate(names):
            reply = None
            for generation in range(1, 200):
                message = submit(name, b"prompt %d" % number, generation=generation, seed=number, max_tokens=30)
                reply = await frontend.submit("w1", message)
                if isinstance(reply, SubmitAccepted):
                    break
            assert isinstance(reply, SubmitAccepted)
        await frontend.finished(*names)
        for number, name in enumerate(names):
            assert frontend.streams[name].tokens == wanted(b"prompt %d" % number, 30, number)
        await frontend.until(lambda: not len(worker.service.core.streams))
        worker.service.core.check()
        assert worker.service.core.batcher.pool.used_blocks == 0

    play(scene, broker=broker)


@pytest.mark.parametrize("data", [b"", b"rubbish", b"\x80", encode(Report())[:-3], b"\xc1" * 100])
def test_what_is_no_command_is_answered_counted_and_dropped(data: bytes) -> None:
    """The sender hears what is wrong, and the worker serves on."""

    async def scene(worker: RunningWorker, frontend: SmallFrontend) -> None:
        reply = decode(WORKER_REPLY, await frontend.bus.request(SUBJECTS.worker_commands("w1"), data, 1.0))
        assert isinstance(reply, CommandInvalid)
        assert reply.message
        await frontend.bus.publish(SUBJECTS.worker_commands("w1"), data)
        assert isinstance(await frontend.submit("w1", submit("a")), SubmitAccepted)
        assert worker.service.counts.invalid_messages == 2

    play(scene)


def test_a_grammar_the_engine_refuses_is_a_bad_request() -> None:
    """The engine is asked before the core decides."""

    async def scene(worker: RunningWorker, frontend: SmallFrontend) -> None:
        await frontend.worker()
        reply = await frontend.submit("w1", submit("a", grammar=Grammar(text="no grammar {{")))
        assert isinstance(reply, SubmitRefused)
        assert reply.reason == "bad_request"

    async def main() -> None:
        # In real time: the engine is asked on a thread.
        memory = MemoryBroker(seed=1)
        frontend = SmallFrontend(memory.connect())
        await frontend.start()
        settings = worker_settings()
        bus = memory.connect()
        async with running_worker(bus, make_engine(settings.engine_options), SystemClock(), settings) as worker:
            await scene(worker, frontend)
        await bus.close()
        await frontend.bus.close()

    asyncio.run(main())


def test_reports_come_each_second_and_on_request() -> None:
    """The first with the join, then one each interval, at once when a scheduler asks all workers."""

    async def scene(worker: RunningWorker, frontend: SmallFrontend) -> None:
        await asyncio.sleep(3.5)
        reports = [event.number for event in frontend.events if isinstance(event, WorkerReport)]
        assert reports == [0, 1, 2, 3]
        await frontend.bus.publish(SUBJECTS.all_workers, encode(Report()))
        await frontend.until(lambda: sum(isinstance(event, WorkerJoined) for event in frontend.events) == 2)

    play(scene)


def test_tokens_lost_while_disconnected_are_sent_after_the_reconnection() -> None:
    """The engine goes on meanwhile; the status asked on reconnection brings the rest."""

    async def scene(worker: RunningWorker, frontend: SmallFrontend) -> None:
        bus = worker.service._bus
        await frontend.submit("w1", submit("a", max_tokens=200))
        await frontend.until(lambda: len(frontend.streams["a"].tokens) > 3)
        bus.disconnect()  # type: ignore[attr-defined]
        await asyncio.sleep(45)
        assert frontend.streams["a"].finish is None
        assert worker.service.counts.unsent_messages > 0
        bus.reconnect()  # type: ignore[attr-defined]
        await frontend.finished("a")
        assert frontend.streams["a"].tokens == wanted(b"hello", 200)

    play(scene)


def test_a_silent_frontend_loses_its_sequences() -> None:
    """Thirty seconds without an answer, and nothing of it is held."""

    async def scene(worker: RunningWorker, frontend: SmallFrontend) -> None:
        frontend.answers = False
        await frontend.submit("w1", submit("a"))
        await frontend.finished("a")
        await asyncio.sleep(28)
        assert len(worker.service.core.streams) == 1
        await asyncio.sleep(5)
        assert len(worker.service.core.streams) == 0

    play(scene)


def test_an_answer_that_makes_no_sense_is_counted_and_asked_again() -> None:
    """A frontend that answers rubbish is like one that does not answer."""

    async def scene(worker: RunningWorker, frontend: SmallFrontend) -> None:
        async def rubbish(delivery: Delivery) -> None:
            await frontend.bus.publish(delivery.reply_to, b"rubbish")

        await frontend.bus.subscribe(SUBJECTS.frontend_control("f2"), rubbish)
        await frontend.submit("w1", submit("a", frontend="f2", max_tokens=1))
        await asyncio.sleep(2.5)
        assert worker.service.counts.invalid_messages == 2
        assert len(worker.service.core.streams) == 1

    play(scene)


def test_stopping_finishes_what_runs_and_says_goodbye() -> None:
    """New work is refused, the rest delivered and acknowledged, then the worker leaves."""

    async def scene(worker: RunningWorker, frontend: SmallFrontend) -> None:
        await frontend.submit("w1", submit("a", max_tokens=200))
        worker.stop.set()
        await frontend.until(lambda: any(isinstance(e, WorkerReport) and e.draining for e in frontend.events))
        await worker.task
        assert frontend.streams["a"].tokens == wanted(b"hello", 200)
        assert worker.service.failure == ""
        await frontend.until(lambda: frontend.events[-1] == WorkerLeft(worker="w1", reason="stopped"))

    play(scene)


def test_metrics_tell_what_the_worker_did() -> None:
    """Counters of steps, tokens and refusals; gauges of the pool."""

    async def scene(worker: RunningWorker, frontend: SmallFrontend) -> None:
        await frontend.submit("w1", submit("a", max_tokens=5))
        await frontend.submit("w1", submit("b", model="other"))
        await frontend.finished("a")
        registry = CollectorRegistry()
        registry.register(worker.service.collector())
        text = generate_latest(registry).decode()
        for line in (
            "mell_worker_sampled_tokens_total 5.0",
            "mell_worker_submissions_total 2.0",
            "mell_worker_refusals_total 1.0",
            "mell_worker_kv_blocks 64.0",
            "mell_worker_kv_blocks_used 0.0",
        ):
            assert line in text.splitlines()

    play(scene)


def test_debug_logs_say_what_led_to_what_and_hold_no_text() -> None:
    """Each event with the commands that it caused, by kind."""
    logged: list[dict[str, object]] = []

    def keep(_logger: object, _method: str, entry: dict[str, object]) -> dict[str, object]:
        logged.append(dict(entry))
        raise structlog.DropEvent

    async def scene(worker: RunningWorker, frontend: SmallFrontend) -> None:
        await frontend.submit("w1", submit("a", b"secret", max_tokens=2))
        await frontend.finished("a")

    structlog.configure(processors=[keep], wrapper_class=structlog.make_filtering_bound_logger("debug"))
    try:
        play(scene)
    finally:
        structlog.reset_defaults()
    handled = [(entry["cause"], entry["commands"]) for entry in logged if entry["event"] == "handled"]
    assert ("CommandReceived(Submit)", ["RunStep", "Reply(SubmitAccepted)"]) in handled
    assert "secret" not in str(logged)


# --- with threads, in real time


class GatedEngine(FakeEngine):
    """An engine whose steps wait for the test, on their own thread."""

    def __init__(self, settings: WorkerSettings) -> None:
        super().__init__(settings.engine_options)
        self.computing = threading.Event()
        self.gate = threading.Event()
        self.error: Exception | None = None

    def execute(self, rows: Sequence[StepRow]) -> StepResult:
        """Wait for the gate, then compute or fail."""
        self.computing.set()
        assert self.gate.wait(60), "the test opens the gate"
        if self.error is not None:
            raise self.error
        return super().execute(rows)


async def play_gated(
    scene: Callable[[RunningWorker, SmallFrontend, GatedEngine], Awaitable[None]], **changes: object
) -> None:
    """Run a scene with a gated engine on an in-memory bus, in real time."""
    settings = worker_settings(fake_step_us=1, **changes)
    memory = MemoryBroker(seed=1)
    bus, frontend = memory.connect(), SmallFrontend(memory.connect())
    await frontend.start()
    engine = GatedEngine(settings)
    async with running_worker(bus, engine, SystemClock(), settings) as worker:
        try:
            await frontend.worker()
            await scene(worker, frontend, engine)
        finally:
            engine.gate.set()
    await bus.close()
    await frontend.bus.close()


async def test_commands_are_served_while_a_step_is_computed() -> None:
    """A cancel during a step is answered at once, and that step's token is not published."""

    async def scene(worker: RunningWorker, frontend: SmallFrontend, engine: GatedEngine) -> None:
        await frontend.submit("w1", submit("a"))
        await asyncio.to_thread(engine.computing.wait)
        assert await frontend.command("w1", Cancel(sequence="a", generation=1)) == CancelDone()
        assert isinstance(await frontend.submit("w1", submit("b", max_tokens=3)), SubmitAccepted)
        engine.gate.set()
        await frontend.finished("b")
        assert frontend.streams["a"].tokens == []
        assert frontend.streams["b"].tokens == wanted(b"hello", 3)

    await play_gated(scene)


async def test_a_failed_engine_gives_its_sequences_back() -> None:
    """Frontends get them back with all output, schedulers hear the reason, and the run ends with it."""

    async def scene(worker: RunningWorker, frontend: SmallFrontend, engine: GatedEngine) -> None:
        engine.error = EngineError("out of device memory")
        engine.gate.set()
        await frontend.submit("w1", submit("a", output_ids=[65, 66], max_tokens=9))
        await worker.task
        assert worker.service.failure == "out of device memory"
        evicted, *repeated = frontend.evicted
        assert (evicted.sequence, evicted.generation, evicted.output_ids) == ("a", 1, [65, 66])
        assert all(again == evicted for again in repeated)
        await frontend.until(lambda: frontend.events[-1] == WorkerLeft(worker="w1", reason="out of device memory"))

    await play_gated(scene)


async def test_a_bug_in_the_engine_ends_the_run_with_its_traceback() -> None:
    """Only `EngineError` is an outcome; anything else is a bug that must not be survived."""

    async def scene(worker: RunningWorker, frontend: SmallFrontend, engine: GatedEngine) -> None:
        engine.error = ZeroDivisionError("a bug")
        engine.gate.set()
        await frontend.submit("w1", submit("a"))
        with pytest.raises(ExceptionGroup) as caught:
            await worker.task
        assert caught.group_contains(ZeroDivisionError, match="a bug")

    await play_gated(scene)


async def test_a_step_that_never_ends_is_a_failed_engine() -> None:
    """The worker gives everything back and ends, though the step still hangs."""

    async def scene(worker: RunningWorker, frontend: SmallFrontend, engine: GatedEngine) -> None:
        await frontend.submit("w1", submit("a"))
        await worker.task
        assert "MELL_STEP_TIMEOUT_S" in worker.service.failure
        assert {eviction.sequence for eviction in frontend.evicted} == {"a"}

    await play_gated(scene, step_timeout_s=0.05)


# --- on a real broker


async def test_the_same_over_nats(connect_bus: Callable[[], Awaitable[NatsBus]]) -> None:
    """Sequences of two frontends stream side by side, and statuses reach each with its own."""
    settings = worker_settings(max_step_tokens=256, status_interval_s=0.05)
    first, second = SmallFrontend(await connect_bus(), "f1"), SmallFrontend(await connect_bus(), "f2")
    await first.start()
    await second.start()
    engine = make_engine(settings.engine_options)
    async with running_worker(await connect_bus(), engine, SystemClock(), settings) as worker:
        await first.worker()
        for number in range(6):
            frontend = (first, second)[number % 2]
            message = submit(f"s{number}", frontend=frontend.name, seed=number, max_tokens=100)
            assert isinstance(await frontend.submit("w1", message), SubmitAccepted)
        await first.finished("s0", "s2", "s4")
        await second.finished("s1", "s3", "s5")
        for number in range(6):
            assert (first, second)[number % 2].streams[f"s{number}"].tokens == wanted(b"hello", 100, number)
        await first.until(lambda: not worker.service.core.streams.frontends)
        worker.stop.set()
        await worker.task
    assert all(isinstance(status, StreamStatus) and "s1" not in status.sequences for status in first.statuses)
