"""The same cluster in virtual time: all real cores and fake engines, every message as bytes, no faults, no waiting.

What a busy machine does to real processes it cannot do to this: a step takes what the latency model says, a message
0.1 to 2 ms. Of the real services only the shells are missing. A run is the same each time.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from mell_console.bench.measure import ClientCost, Outcome, summarise
from mell_frontend.generation import SequenceRequest
from mell_frontend.stream.commands import DeliverTokens, FailSequence
from mell_gpu_worker.core.commands import RunStep
from mell_gpu_worker.core.events import StepFinished
from mell_gpu_worker.core.step import StepResult, StepRow
from mell_scheduler.core.journal import event_line, header_line, replay
from mell_scheduler.settings import SchedulerSettings
from mell_scheduler.sim.requests import Request
from mell_shared.messages.frontend import Claim, FrontendReply, TokensGenerated
from mell_shared.messages.sampling import SamplingParams
from mell_shared.messages.worker import Submit
from mell_shared.models import FAKE_EOS_ID, FAKE_MODEL, FAKE_VOCAB_SIZE
from tests.benchmarks.live import LONGEST_WAIT_S, LiveRun, Shape, told
from tests.cluster.simulation.clock import SECOND_US, EventQueue, LocalClock
from tests.cluster.simulation.frontend import FrontendProcess
from tests.cluster.simulation.judge import Judge
from tests.cluster.simulation.scenario import Scenario, WorkerShape
from tests.cluster.simulation.scheduler import SchedulerProcess
from tests.cluster.simulation.simulation import Simulation
from tests.cluster.simulation.worker import WorkerProcess
from tests.gpu_worker.core.worlds import BLOCK_TOKENS, worker_config

_SETTLED_US = 10 * SECOND_US
"""By then a scheduler leads and has heard every worker."""
_MOST_BLOCK_US = 300
"""So that 100 blocks take 20 ms, as they do between real processes here."""
_LETTERS = 26


def run_virtually(policy: str, shape: Shape, requests: Sequence[Request]) -> LiveRun:
    """Send the requests at their times to a cluster that has just come up; returns when all have ended."""
    assert shape.block_tokens == BLOCK_TOKENS, "the simulated workers have blocks of one size"
    cluster = _Cluster(policy, shape)
    outcomes = cluster.play(requests)
    first, last = outcomes[0].sent_us, max(outcome.ended_us for outcome in outcomes)
    run = LiveRun(shape, policy, outcomes, summarise(outcomes, ClientCost(0.0, (last - first) / 1e6)))
    assert not run.report["errors"], run.report["errors"]
    run.journal = list(replay([header_line(*cluster.header()), *cluster.watch.lines]))
    run.logged = cluster.watch.logged
    return run


class _Watch(Judge):
    """Notes what schedulers are told and decide, and what readers get; judges nothing, for others do."""

    def __init__(self, queue: EventQueue, longest_tokens: int) -> None:
        super().__init__(queue, longest_tokens)
        self._queue = queue
        self.lines: list[str] = []
        self.logged: list[tuple[str, dict[str, Any]]] = []
        self.outcomes: dict[str, Outcome] = {}
        self.schedulers: set[str] = set()

    def saw(self, name: str, event: object, commands: Sequence[object]) -> None:
        if name in self.schedulers:
            self.lines.append(event_line(event, self._queue.now_us))
            self.logged += [found for command in commands if (found := told(command)) is not None]

    def delivered(self, command: DeliverTokens, cause: object) -> None:
        outcome, now_us = self.outcomes[command.sequence], self._queue.now_us
        if command.token_ids:
            if outcome.last_us is None:
                outcome.first_us = now_us
            else:
                outcome.gaps_us.append(now_us - outcome.last_us)
            outcome.last_us = now_us
            outcome.pieces += 1
            outcome.output_tokens += len(command.token_ids)
        if command.finish_reason is not None:
            outcome.ended_us = now_us

    def failed(self, command: FailSequence) -> None:
        outcome = self.outcomes[command.sequence]
        outcome.error, outcome.ended_us = f"{command.failure}: {command.message}", self._queue.now_us

    def waits(self, sequence: str) -> None:
        pass

    def submitted(self, submit: Submit, worker: str) -> None:
        pass

    def answered(self, claim: Claim | None, reply: FrontendReply) -> None:
        pass

    def published(self, worker: str, message: TokensGenerated) -> None:
        pass

    def step_began(self, worker: WorkerProcess, rows: tuple[StepRow, ...]) -> frozenset[int]:
        return frozenset()

    def step_ends(self, worker: WorkerProcess, rows: tuple[StepRow, ...]) -> None:
        pass


class _Worker(WorkerProcess):
    """Its steps take a fixed time, as the fake engine's with the same setting do."""

    fixed_us = 0

    def _run(self, command: RunStep) -> None:
        def finish() -> None:
            result = self.engine.execute(command.rows)
            self.handle(StepFinished(StepResult(result.sampled, self.fixed_us, result.failed)))

        self.after(self.fixed_us, finish)


class _Cluster(Simulation):
    def __init__(self, policy: str, shape: Shape) -> None:
        names = [f"w{number}" for number in range(shape.workers)]
        tokens = shape.capacity_tokens
        shapes = tuple(WorkerShape(name, shape.kv_blocks, 256, 512, shape.step_us, True, tokens) for name in names)
        super().__init__(Scenario(0, policy, shapes, ("f",), ("s",), (), ()))
        self._shape = shape
        self._settings = SchedulerSettings(
            policy=policy, epoch_s=shape.epoch_s, report_interval_s=shape.epoch_s, queue_wait_s=LONGEST_WAIT_S
        )
        self.links.most_block_us = _MOST_BLOCK_US
        self.watch = _Watch(self.queue, tokens)
        self.judge = self.watch
        self._around = replace(self._around, judge=self.watch)

    def header(self) -> tuple[Any, Any, Any]:
        """What a journal's first line is made of."""
        return self.scenario.policy, self._settings.policy_settings(), self._settings.core_settings()

    def play(self, requests: Sequence[Request]) -> list[Outcome]:
        """Let all requests come and end."""
        # Workers come up one after another, so that their reports are spread over the interval as they are live.
        spread_us = round(self._shape.epoch_s * SECOND_US) // self._shape.workers
        for number, node in enumerate(self.scenario.nodes):
            self.queue.at(number * spread_us, partial(self._start, node))
        for number, request in enumerate(requests):
            self.queue.at(_SETTLED_US + request.arrival_us, partial(self._ask, f"r{number}", request))
        while len(self.watch.outcomes) < len(requests) or not all(o.ended_us for o in self.watch.outcomes.values()):
            assert self.queue.step(), "nothing is left to happen"
        return list(self.watch.outcomes.values())

    def _ask(self, name: str, request: Request) -> None:
        outcome = Outcome(self.queue.now_us, prompt_tokens=request.prompt_tokens, counted=True)
        self.watch.outcomes[name] = outcome
        number = len(self.watch.outcomes)
        prompt = [97 + (number * 7 + place * (number + 3)) % _LETTERS for place in range(request.prompt_tokens)]
        sampling = SamplingParams(seed=number, max_tokens=request.output_tokens, ignore_eos=True)
        frontend = self.processes["f"]
        assert isinstance(frontend, FrontendProcess)
        frontend.open(SequenceRequest(name, FAKE_MODEL, prompt, sampling))

    def _make(self, node: str, name: str) -> WorkerProcess | FrontendProcess | SchedulerProcess:
        clock = LocalClock(self.queue, 0, 0)
        made: WorkerProcess | FrontendProcess | SchedulerProcess
        if node == "f":
            made = FrontendProcess(node, name, clock, self._around)
        elif node == "s":
            self.watch.schedulers.add(name)
            made = _Scheduler(node, name, clock, self._around, self._settings)
        else:
            made = self._worker_at(node, name, clock)
        if not isinstance(made, SchedulerProcess):
            made.core.check = _nothing  # type: ignore[method-assign]
        return made

    def _worker_at(self, node: str, name: str, clock: LocalClock) -> _Worker:
        shape = self._shape
        every_us = round(shape.epoch_s * SECOND_US)
        config = worker_config(
            worker=name, name=node, host=node, model=FAKE_MODEL, kv_blocks=shape.kv_blocks,
            max_model_len=shape.capacity_tokens, max_sequences=256, vocab_size=FAKE_VOCAB_SIZE,
            eos_token_ids=(FAKE_EOS_ID,), max_step_tokens=512, prefix_cache=True, report_interval_us=every_us,
            migration_modes=("kv", "tokens", "hybrid"),
        )  # fmt: skip
        told = {"kv_bytes_per_token": shape.kv_bytes_per_token, "link_bytes_per_s": _link_bytes_per_s(shape)}
        config = replace(config, spec=config.spec.model_copy(update=told))
        worker = _Worker(node, clock, self._around, config, shape.step_us)
        worker.fixed_us = shape.step_us
        return worker


def _link_bytes_per_s(shape: Shape) -> int:
    """What the workers' link carries on average."""
    return round(2e6 * shape.kv_bytes_per_token * shape.block_tokens / (100 + _MOST_BLOCK_US))


class _Scheduler(SchedulerProcess):
    def _begin(self, term: int) -> None:
        super()._begin(term)
        assert self.core is not None
        self.core.check = _nothing  # type: ignore[method-assign]


def _nothing() -> None:
    """Checks take most of the time; the cluster's own tests make them."""
