"""The simulation and the services are one: cores repeat the services' logs; one load does the same in both."""

import asyncio
from collections import Counter
from collections.abc import Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import pytest

from mell_frontend.gateway import BusGateway
from mell_frontend.generation import Delta, SequenceRequest
from mell_frontend.sequence_stream import BufferedStream
from mell_frontend.stream.commands import DeliverTokens, SubmitSequence
from mell_frontend.stream.core import FrontendCore
from mell_gpu_worker.core.worker import WorkerCore
from mell_gpu_worker.engine.factory import make_engine
from mell_gpu_worker.engine.fake import expected_output
from mell_gpu_worker.transport.base import TransportOptions
from mell_gpu_worker.transport.memory import MemoryNetwork
from mell_scheduler.core import SchedulerCore
from mell_scheduler.policy import make_policy
from mell_scheduler.settings import SchedulerSettings
from mell_shared.codec import decode, encode
from mell_shared.messages.sampling import SamplingParams
from mell_shared.messages.worker import WORKER_REPLY, Migrate, MigrateAccepted
from mell_shared.models import FAKE_MODEL
from mell_shared.testing import VirtualTimeLoop, run_virtually
from tests.cluster.simulation.clock import SECOND_US
from tests.cluster.simulation.faults import Shove
from tests.cluster.simulation.scenario import Scenario, Wish, WorkerShape
from tests.cluster.simulation.simulation import Simulation
from tests.cluster.simulation.story import brief
from tests.gpu_worker.fleet import NO_LANES, STEP_US, PacedRunner
from tests.gpu_worker.streaming import SUBJECTS, running_worker, worker_settings
from tests.scheduler.stage import Stage, staged

POLICY = "best-fit"
MOVED = "r0"


@dataclass
class Log:
    """One core: how it was built, and what it was told and said."""

    built: tuple[Any, ...]
    entries: list[tuple[int, Any, list[Any], list[str]]] = field(default_factory=list)
    """Time, event, commands, and these in words, for some hold lists that go on changing."""


class Recorder:
    """Logs every core that is built while it is there."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.logs: dict[type, list[Log]] = {WorkerCore: [], FrontendCore: [], SchedulerCore: []}
        self._of: dict[int, Log] = {}
        for kind in self.logs:
            self._watch(patch, kind)

    def _watch(self, patch: pytest.MonkeyPatch, kind: type[Any]) -> None:
        build, handle = kind.__init__, kind.handle

        def built(core: Any, *arguments: Any) -> None:
            build(core, *arguments)
            self._of[id(core)] = log = Log(arguments)
            self.logs[kind].append(log)

        def handled(core: Any, event: Any, now_us: int) -> Any:
            commands = handle(core, event, now_us)
            self._of[id(core)].entries.append((now_us, event, commands, [brief(c) for c in commands]))
            return commands

        patch.setattr(kind, "__init__", built)
        patch.setattr(kind, "handle", handled)

    def commands(self, kind: type) -> Iterable[Any]:
        """Yield everything that the cores of a kind have said."""
        return (command for log in self.logs[kind] for _, _, commands, _ in log.entries for command in commands)


REQUESTS = tuple(
    SequenceRequest(
        f"r{number}",
        FAKE_MODEL,
        list(range(97, 97 + length)),
        SamplingParams(seed=number, max_tokens=tokens, ignore_eos=True),
    )
    for number, (length, tokens) in enumerate([(17, 60), (9, 25), (20, 1), (5, 40)])
)  # fmt: skip


async def _serve() -> dict[str, list[int]]:
    """Run scheduler, two workers and a frontend, and stream all requests, one of which is moved."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    wires = MemoryNetwork()
    async with staged(seed=1) as stage, AsyncExitStack() as stack:
        stage.scheduler("s1", policy=POLICY, subject_prefix=SUBJECTS.prefix)
        for name in ("w1-1", "w2-1"):
            settings = worker_settings(worker_name=name, fake_step_us=0, kv_blocks=64, max_sequences=8)
            transport = wires.transport(TransportOptions(hello_timeout_s=1.0), lambda *_: None)
            engine = make_engine(settings.engine_options)
            around = {"transport": transport, "lanes": NO_LANES}
            await stack.enter_async_context(running_worker(stage.bus(), engine, loop, settings, PacedRunner, **around))
        gateway = BusGateway(stage.bus(), SUBJECTS, FrontendCore("f1-1"), loop)
        stage.tasks.append(stage.group.create_task(gateway.run()))
        await asyncio.sleep(3.0)
        streams = [gateway.open(request) for request in REQUESTS]
        texts = await asyncio.gather(*(_read(stream) for stream in streams), _move(stage))
        await asyncio.sleep(3.0)
        return dict(zip((request.sequence for request in REQUESTS), texts, strict=False))


async def _read(stream: BufferedStream) -> list[int]:
    ids: list[int] = []
    while True:
        part = await stream.next()
        if isinstance(part, Delta):
            ids += part.token_ids
            if part.finish_reason is not None:
                return ids


async def _move(stage: Stage) -> list[int]:
    """Order one move to whichever worker does not have the sequence."""
    await asyncio.sleep(0.05)
    for source, target in (("w1-1", "w2-1"), ("w2-1", "w1-1")):
        order = Migrate(
            migration=f"by-hand-{source}",
            sequence=MOVED,
            generation=1,
            target=target,
            mode="kv",
            reason="manual",
            term=1,
        )
        reply = await stage.bus().request(SUBJECTS.worker_commands(source), encode(order), 1.0)
        if isinstance(decode(WORKER_REPLY, reply), MigrateAccepted):
            return []
    raise AssertionError("nobody has the sequence")


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """A recorder."""
    return Recorder(monkeypatch)


def test_cores_repeat_the_log_of_real_services(recorder: Recorder) -> None:
    """What the shells told their cores, told again to new ones, makes the same commands at every event."""
    texts = run_virtually(_serve())
    for request in REQUESTS:
        assert request.sampling.max_tokens is not None
        assert texts[request.sequence] == expected_output(
            request.prompt_ids, request.sampling, request.sampling.max_tokens
        )
    logs = {kind: list(logs) for kind, logs in recorder.logs.items()}
    assert {kind: len(found) for kind, found in logs.items()} == {WorkerCore: 2, FrontendCore: 1, SchedulerCore: 1}
    settings = SchedulerSettings(policy=POLICY)
    for kind, found in logs.items():
        for log in found:
            assert len(log.entries) > 30
            built = log.built
            if kind is SchedulerCore:
                built = (make_policy(POLICY, settings.policy_settings()), *log.built[1:3], settings.make_shadow())
            core = kind(*built)
            for now_us, event, _, said in log.entries:
                assert [brief(command) for command in core.handle(event, now_us)] == said
            core.check()


def test_the_same_requests_make_the_same_commands_in_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """Submissions, delivered tokens and the steps of a move are those of the real shells, in the simulation too."""
    with monkeypatch.context() as patch:
        shells = Recorder(patch)
        run_virtually(_serve())
    with monkeypatch.context() as patch:
        simulated = Recorder(patch)
        _simulate()
    assert _streams(simulated) == _streams(shells)
    assert _move_steps(simulated) == _move_steps(shells)
    assert _move_steps(shells)["AskFrontend(Claim)"] == 1


def _simulate() -> None:
    shapes = tuple(
        WorkerShape(name, 256, 8, 64, STEP_US, prefix_cache=True, max_model_len=1024) for name in ("w1", "w2")
    )
    wishes = tuple(Wish(3 * SECOND_US, "f1", request, None) for request in REQUESTS)
    # Whoever has the sequence refuses one of the two.
    moves = tuple(Shove(3 * SECOND_US + 50_000, 0, 0, target, "kv", 1, stale=False) for target in (0, 1))
    scenario = Scenario(1, POLICY, shapes, ("f1",), ("s1",), wishes, moves)
    Simulation(scenario).run()


def _streams(recorder: Recorder) -> dict[str, list[Any]]:
    """By sequence: the generations submitted with how much output, all tokens, the reason of the end."""
    streams: dict[str, list[Any]] = {}
    for command in recorder.commands(FrontendCore):
        match command:
            case SubmitSequence(message=message):
                streams.setdefault(message.sequence, [[], [], ""])[0].append((message.generation, message.output_ids))
            case DeliverTokens(sequence, ids, _, reason):
                streams[sequence][1] += ids
                streams[sequence][2] = reason or ""
    return streams


def _move_steps(recorder: Recorder) -> Counter[str]:
    """How often each step of the one move was taken; rounds of blocks depend on the links' speed and count once."""
    steps: Counter[str] = Counter()
    for command in recorder.commands(WorkerCore):
        kind, message = type(command).__name__, getattr(command, "message", None)
        step = f"{kind}({type(message).__name__})" if message is not None else kind
        if kind in {"AskPeer", "AskFrontend", "OfferKv", "OpenLink", "SendBlocks", "CloseLink"} or "Migration" in step:
            steps[step] = 1 if kind == "SendBlocks" else steps[step] + 1
    return steps
