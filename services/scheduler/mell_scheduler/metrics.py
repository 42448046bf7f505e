"""The scheduler's metrics: counts of what was decided, and the core's state at the moment it is asked for."""

from collections import Counter as Counts
from collections import deque
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mell_scheduler.core import MigrationSettled, SchedulerCore

_DECISION_BUCKETS_S = (10e-6, 25e-6, 50e-6, 100e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 5e-3, 10e-3, 50e-3, 250e-3)


_RECENT_MOVES = 64
"""More than are begun between two looks, so that who watches sees each."""


class Tally:
    """What this process did since it started."""

    def __init__(self) -> None:
        self.placed = 0
        self.queued = 0
        self.rejected: Counts[str] = Counts()
        """By reason."""
        self.dropped: Counts[str] = Counts()
        """Messages that could not be used: by kind of fault."""
        self.moves_begun = 0
        self.moves_settled: Counts[str] = Counts()
        """By outcome."""
        self.moves_failed: Counts[str] = Counts()
        """By reason."""
        self.recent_moves: deque[tuple[int, MigrationSettled]] = deque(maxlen=_RECENT_MOVES)
        """When they were settled, and how; the latest first."""
        self.unsent = 0
        """Replies and commands that the bus did not take."""

    def settled(self, move: MigrationSettled, now_us: int) -> None:
        """Count a move that is over."""
        self.moves_settled[move.outcome] += 1
        if move.outcome in ("failed", "timeout"):
            self.moves_failed[failure(move)] += 1
        self.recent_moves.appendleft((now_us, move))


def failure(move: MigrationSettled) -> str:
    """Why a move failed, in one word."""
    return move.reason.partition(":")[0] if move.outcome == "failed" else move.outcome


class SchedulerCollector(Collector):
    """The tally, and the present core's state (none while this scheduler does not lead)."""

    def __init__(self, tally: Tally, core: Callable[[], SchedulerCore | None]) -> None:
        self._tally = tally
        self._core = core

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics as they are now."""
        tally, core = self._tally, self._core()
        yield GaugeMetricFamily("mell_scheduler_leads", "1 while this scheduler leads.", int(core is not None))
        yield CounterMetricFamily("mell_scheduler_placed", "Placements answered.", tally.placed)
        yield CounterMetricFamily("mell_scheduler_queued", "Answers that there is no room yet.", tally.queued)
        yield _by("mell_scheduler_rejected", "Requests rejected.", "reason", tally.rejected)
        yield _by("mell_scheduler_dropped_messages", "Messages that could not be used.", "fault", tally.dropped)
        yield CounterMetricFamily("mell_scheduler_migrations_begun", "Moves ordered.", tally.moves_begun)
        yield _by("mell_scheduler_migrations", "Moves settled, by outcome.", "outcome", tally.moves_settled)
        yield _by("mell_scheduler_migration_failures", "Moves that failed.", "reason", tally.moves_failed)
        yield CounterMetricFamily("mell_scheduler_unsent", "Messages that the bus did not take.", tally.unsent)
        if core is not None:
            yield from _state(core)


def decision_seconds(registry: CollectorRegistry) -> Histogram:
    """Return the histogram of the core's time for one event, by kind of event."""
    return Histogram(
        "mell_scheduler_decision_seconds",
        "Time that the core takes for one event.",
        ["event"],
        registry=registry,
        buckets=_DECISION_BUCKETS_S,
    )


def epoch_seconds(registry: CollectorRegistry) -> Histogram:
    """Return the histogram of the core's time for an epoch's plan of moves."""
    text = "Time that planning an epoch's moves takes."
    return Histogram("mell_epoch_seconds", text, registry=registry, buckets=_DECISION_BUCKETS_S)


def _by(name: str, text: str, label: str, counts: Counts[str]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, text, labels=[label])
    for value, count in sorted(counts.items()):
        family.add_metric([value], count)
    return family


def _state(core: SchedulerCore) -> Iterator[Metric]:
    yield GaugeMetricFamily("mell_scheduler_queue_length", "Requests that wait for room.", len(core.waiting))
    waiting = GaugeMetricFamily("vllm:num_requests_waiting", "Requests waiting to be placed.", labels=["model_name"])
    for name in core.ledger.models:
        waiting.add_metric([name], len(core.waiting.of(name)))
    yield waiting
    yield GaugeMetricFamily("mell_scheduler_sequences", "Sequences placed or running.", len(core.ledger.sequences))
    yield GaugeMetricFamily("mell_scheduler_migrating", "Moves under way.", len(core.ledger.moving))
    yield GaugeMetricFamily("mell_scheduler_moves_paused", "1 while no moves are planned.", int(core.moves_paused))
    wanted = GaugeMetricFamily("mell_scheduler_gpus_wanted", "Workers that should be up, by model.", labels=["model"])
    for name, gpus in core.scaling.wanted.items():
        wanted.add_metric([name], gpus)
    yield wanted
    workers = list(core.ledger.workers.values())
    states = GaugeMetricFamily("mell_scheduler_workers", "Workers, by state.", labels=["state"])
    standings = Counts(core.ledger.standing(worker) for worker in workers)
    for state in ("active", "standby", "draining", "drained", "silent"):
        states.add_metric([state], standings[state])
    yield states
    blocks = GaugeMetricFamily("mell_scheduler_kv_blocks", "KV blocks of all workers, by model.", labels=["model"])
    used = GaugeMetricFamily("mell_scheduler_kv_blocks_used", "KV blocks in use, by model.", labels=["model"])
    for name, model in core.ledger.models.items():
        blocks.add_metric([name], sum(worker.spec.kv_blocks for worker in model.workers.values()))
        used.add_metric([name], sum(worker.used_blocks for worker in model.workers.values()))
    yield blocks
    yield used
