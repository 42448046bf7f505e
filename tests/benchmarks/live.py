"""A cluster of real processes under a recorded load, and its figures as the scheduler's event log tells them."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mell_console.bench.client import Target
from mell_console.bench.http1 import HttpClient
from mell_console.bench.load import Load
from mell_console.bench.measure import Outcome, summarise
from mell_console.bench.settings import BenchSettings
from mell_console.bench.warmup import warm_up
from mell_console.bench.workload import plan_shots
from mell_scheduler.core import Command, Event, MigrationSettled, Reply, StartMigration
from mell_scheduler.core.journal import replay
from mell_scheduler.sim.requests import US_PER_S, Request
from mell_scheduler.sim.series import Series
from mell_shared.clock import SystemClock
from mell_shared.messages.scheduler import WorkerReport
from tests.cluster.stack import Service, Stack, eventually

_LOADING_S = 120.0
LONGEST_WAIT_S = 600.0
"""No request is turned away: all policies must do the same work."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What each cluster of a benchmark is made of. Blocks are small, so that rounding up to them costs little."""

    workers: int
    kv_blocks: int = 512
    block_tokens: int = 4
    step_us: int = 50_000
    """A fixed time whatever the batch: the simulator's requests grow at one rate too."""
    kv_bytes_per_token: int = 4096
    epoch_s: float = 0.5

    @property
    def capacity_tokens(self) -> int:
        """What one worker holds."""
        return self.kv_blocks * self.block_tokens


@dataclass(slots=True)
class LiveRun:
    """What came of one load: each request as its client saw it, and all that the scheduler heard and decided."""

    shape: Shape
    policy: str
    outcomes: list[Outcome]
    report: dict[str, Any]
    journal: list[tuple[int, Event, list[Command]]] = field(default_factory=list)
    logged: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """Placements and moves as the scheduler logged them while it ran."""

    @property
    def begun_us(self) -> int:
        """When the first request was sent; clocks of one machine agree."""
        return self.outcomes[0].sent_us

    @property
    def decode_tokens_per_s(self) -> float:
        """How fast a running sequence grew."""
        timed = [o for o in self.outcomes if o.first_us is not None and o.last_us is not None]
        decode_us = sum((o.last_us or 0) - (o.first_us or 0) for o in timed)
        return sum(o.output_tokens - 1 for o in timed) / decode_us * US_PER_S

    @property
    def queued(self) -> int:
        """How many requests had to wait for room."""
        told = [fields for name, fields in self.replayed() if name == _PLACED]
        return len({fields["sequence"] for fields in told if fields["kind"] == "queued"})

    def settled(self) -> list[MigrationSettled]:
        """How each move came out."""
        return [c for _, _, commands in self.journal for c in commands if isinstance(c, MigrationSettled)]

    def replayed(self) -> list[tuple[str, dict[str, Any]]]:
        """Placements and moves that the core decides when it is given the log's events again; as `logged`."""
        return [found for _, _, commands in self.journal for c in commands if (found := told(c)) is not None]

    def series(self, until_s: float) -> Series:
        """The run sampled each epoch, as the simulator samples its own."""
        return _Sampler(self, until_s).series()


class LiveCluster:
    """A broker, a scheduler, workers with the fake engine and a frontend; gone when left."""

    def __init__(self, folder: Path, policy: str, shape: Shape) -> None:
        self._folder = folder
        self._policy = policy
        self._shape = shape
        folder.mkdir(parents=True, exist_ok=True)
        every = str(shape.epoch_s)
        self._stack = Stack(folder, {"MELL_LOG_FORMAT": "json", "MELL_REPORT_INTERVAL_S": every})
        self._scheduler: Service | None = None
        self._url = ""

    def __enter__(self) -> "LiveCluster":
        self._stack.__enter__()
        try:
            self._start()
        except BaseException:
            self._stack.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.__exit__()

    def _start(self) -> None:
        shape = self._shape
        flags = ["--policy", self._policy, "--epoch-s", str(shape.epoch_s), "--event-log", str(self._event_log)]
        flags += ["--queue-wait-s", str(LONGEST_WAIT_S)]
        self._scheduler = self._stack.start("mell_scheduler", *flags, "--log-level", "debug")
        engine = ["--engine", "fake", "--kv-blocks", str(shape.kv_blocks), "--block-tokens", str(shape.block_tokens)]
        engine += ["--fake-step-us", str(shape.step_us), "--fake-kv-bytes-per-token", str(shape.kv_bytes_per_token)]
        workers = [
            self._stack.start("mell_gpu_worker", *engine, "--worker-name", f"w{number}")
            for number in range(shape.workers)
        ]
        frontend = self._stack.start_frontend()
        for worker in workers:
            worker.ready(_LOADING_S)
        self._url = frontend.ready(_LOADING_S)["url"]
        joined = self._scheduler
        eventually(lambda: len(joined.events("worker_joined")) == shape.workers, "all workers have joined", _LOADING_S)

    @property
    def _event_log(self) -> Path:
        return self._folder / "events.jsonl"

    async def load(self, trace: Path) -> LiveRun:
        """Send the requests of a trace at their times; every answer must come whole."""
        settings = BenchSettings(url=self._url, model="fake", endpoint="completions", trace=trace)
        http = HttpClient(self._url, {})
        try:
            target = Target(settings, "fake", http, SystemClock())
            load = Load(target, await warm_up(target), lambda _began, _ended: None)
            outcomes, cost = await load.run(plan_shots(settings))
        finally:
            http.close()
        report = summarise(outcomes, cost)
        assert not report["errors"], report["errors"]
        return LiveRun(self._shape, self._policy, outcomes, report)

    def stop(self, run: LiveRun) -> None:
        """End the scheduler in order, and add what it heard and decided to `run`."""
        assert self._scheduler is not None, "it was started"
        self._scheduler.ask_to_stop()
        self._scheduler.exit_code()
        with self._event_log.open() as lines:
            run.journal = list(replay(lines))
        run.logged = [told for line in self._scheduler.lines() if (told := _logged(line)) is not None]


def write_trace(path: Path, requests: Sequence[Request]) -> Path:
    """Write requests as `mell bench` and `mell simulate` read them."""
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("arrival_s", "prompt_tokens", "output_tokens"))
        rows.writerows((r.arrival_us / US_PER_S, r.prompt_tokens, r.output_tokens) for r in requests)
    return path


def recorded(run: LiveRun) -> list[Request]:
    """The load as it really was: when each request was sent, and its tokens as the server counted them."""
    return [Request(o.sent_us - run.begun_us, o.prompt_tokens, o.output_tokens) for o in run.outcomes]


_PLACED, _MOVE, _SETTLED = "decision", "migration", "migration_settled"
_NOT_OF_THE_COMMAND = {"event", "level", "timestamp", "service", "process", "cause"}


def told(command: object) -> tuple[str, dict[str, Any]] | None:
    """Return a placement or move by the fields that the scheduler logs of it; None for other commands."""
    match command:
        case Reply():
            return _PLACED, {"sequence": command.sequence, **command.reply.model_dump(mode="json", exclude_none=True)}
        case StartMigration():
            order = command.order.model_dump(mode="json", exclude={"kind", "traceparent"})
            return _MOVE, {"source": command.source, "predicted_us": command.predicted_us, **order}
        case MigrationSettled():
            return _SETTLED, {"migration": command.migration, "outcome": command.outcome, "took_us": command.took_us}
    return None


def _logged(line: str) -> tuple[str, dict[str, Any]] | None:
    fields = json.loads(line) if line.startswith("{") else {}
    name = fields.get("event")
    if name not in {_PLACED, _MOVE, _SETTLED}:
        return None
    return name, fields


def differences(run: LiveRun) -> list[str]:
    """Where the commands of a replay differ from those that were carried out; empty if nowhere."""
    found = []
    if len(run.logged) != len(run.replayed()):
        found.append(f"{len(run.logged)} commands live, {len(run.replayed())} replayed")
    pairs = zip(_decisions_first(run.logged), _decisions_first(run.replayed()), strict=False)
    for number, (live, again) in enumerate(pairs):
        wrong = [name for name, value in again[1].items() if live[1].get(name) != value]
        if live[0] != again[0] or wrong:
            found.append(f"command {number}: {live} live, {again} replayed")
    return found


def _decisions_first(told: list[tuple[str, dict[str, Any]]]) -> list[tuple[str, dict[str, Any]]]:
    """Decisions in their order, then how moves came out, by name: a scheduler tells that once it knows what it cost."""
    outcomes = [row for row in told if row[0] == _SETTLED]
    return [row for row in told if row[0] != _SETTLED] + sorted(outcomes, key=lambda row: str(row[1]["migration"]))


class _Sampler:
    """Goes through a journal once, noting at each epoch's end what the workers' latest reports say."""

    def __init__(self, run: LiveRun, until_s: float) -> None:
        self._run = run
        self._every_us = round(run.shape.epoch_s * US_PER_S)
        self._samples = round(until_s / run.shape.epoch_s)
        self._reports: dict[str, WorkerReport] = {}
        self._moves = self._moved = self._preempted = self._waiting = 0
        self._series = Series()

    def series(self) -> Series:
        for at_us, event, commands in self._run.journal:
            while at_us >= self._run.begun_us + len(self._series.time_s) * self._every_us:
                self._sample()
            if isinstance(event, WorkerReport):
                before = self._reports.get(event.worker)
                self._preempted += event.preemptions - (before.preemptions if before else 0)
                self._reports[event.worker] = event
            for command in commands:
                if isinstance(command, StartMigration):
                    self._moves += 1
                    self._moved += command.blocks * self._run.shape.block_tokens
        return self._series

    def _sample(self) -> None:
        series, reports = self._series, self._reports.values()
        series.time_s.append(len(series.time_s) * self._run.shape.epoch_s)
        series.gpus.append(sum(1 for report in reports if report.sequences or report.used_blocks))
        series.tokens.append(sum(sum(report.tokens) for report in reports))
        series.moves.append(self._moves)
        series.moved_tokens.append(self._moved)
        series.preemptions.append(self._preempted)
        for column in (series.copied_tokens, series.prefilled_tokens, series.waiting):
            column.append(0)
        self._moves = self._moved = self._preempted = 0
