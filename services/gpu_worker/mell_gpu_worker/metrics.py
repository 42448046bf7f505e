"""The worker's metrics: counters that its shell keeps, and gauges read from the core when asked."""

from collections import Counter as Counts
from collections.abc import Iterator
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mell_gpu_worker.core.step import StepResult
from mell_gpu_worker.core.worker import WorkerCore
from mell_shared.messages.scheduler import MigrationCommitted, MigrationFailed, SchedulerEvent
from mell_shared.messages.worker import SubmitAccepted, SubmitRefused, WorkerReply


@dataclass(slots=True)
class WorkerCounts:
    """Counts since start."""

    steps: int = 0
    step_us: int = 0
    sampled_tokens: int = 0
    submissions: int = 0
    refusals: int = 0
    invalid_messages: int = 0
    unsent_messages: int = 0
    """Not sent because the connection was down or the message too large."""

    def took_step(self, result: StepResult) -> None:
        """Count an engine step."""
        self.steps += 1
        self.step_us += result.step_us
        self.sampled_tokens += sum(1 for sampled in result.sampled if sampled is not None)

    def replied(self, reply: WorkerReply) -> None:
        """Count the answer to a submission; other replies are not counted."""
        self.submissions += isinstance(reply, SubmitAccepted | SubmitRefused)
        self.refusals += isinstance(reply, SubmitRefused)


@dataclass(slots=True)
class DataCounts:
    """Counts of the data plane since start."""

    sent_bytes: int = 0
    received_bytes: int = 0
    unchecked_bytes: int = 0
    """Sent without a checksum of ours: device memory."""
    failures: Counts[str] = field(default_factory=Counts)
    """By reason."""
    door: Counts[str] = field(default_factory=Counts)
    """What the data port told of: by event."""


_PAUSE_BUCKETS_S = (1e-3, 2.5e-3, 5e-3, 10e-3, 25e-3, 50e-3, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


class MoveMetrics:
    """Moves as this worker ends them: arrived (it is the target) or failed (it is the source)."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.moves: Counts[tuple[str, str]] = Counts()
        """By mode and outcome."""
        self._pause = Histogram(
            "mell_worker_migration_pause_seconds",
            "From a moved sequence's last token at its source to its first here: in all, and by share.",
            ["part"],
            registry=self.registry,
            buckets=_PAUSE_BUCKETS_S,
        )

    def published(self, event: SchedulerEvent) -> None:
        """Count what became of a move; other events are not counted."""
        match event:
            case MigrationCommitted():
                self.moves[event.mode or "unknown", "committed"] += 1
                parts = {"all": event.stopped_us, "tail": event.tail_us, "claim": event.claim_us}
                for part, took_us in (parts | {"first_step": event.first_step_us}).items():
                    self._pause.labels(part).observe(took_us / 1e6)
            case MigrationFailed():
                self.moves[event.mode or "unknown", event.reason] += 1
            case _:
                pass


class WorkerCollector(Collector):
    """A worker's state as metrics."""

    def __init__(self, core: WorkerCore, counts: WorkerCounts, moves: MoveMetrics, data: DataCounts) -> None:
        self._core = core
        self._counts = counts
        self._moves = moves
        self._data = data

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics as they are now."""
        yield from self._gauges()
        yield from self._as_vllm()
        yield from self._counters()
        yield from self._migration()

    def _gauges(self) -> Iterator[Metric]:
        batcher = self._core.batcher
        yield GaugeMetricFamily("mell_worker_running", "Sequences running.", len(batcher.running))
        yield GaugeMetricFamily("mell_worker_waiting", "Preempted sequences.", len(batcher.waiting))
        yield GaugeMetricFamily("mell_worker_kv_blocks", "KV blocks of the pool.", batcher.pool.kv_blocks)
        yield GaugeMetricFamily("mell_worker_kv_blocks_used", "KV blocks held.", batcher.pool.used_blocks)
        yield GaugeMetricFamily("mell_worker_draining", "1 while nothing new is taken.", int(self._core.draining))

    def _as_vllm(self) -> Iterator[Metric]:
        """Yield what vLLM calls by another name, and means the same by."""
        batcher, model = self._core.batcher, [self._core.config.spec.model]
        use = batcher.pool.used_blocks / batcher.pool.kv_blocks
        gauges = {
            "num_requests_running": ("Sequences in the engine's batches.", len(batcher.running)),
            "num_requests_waiting": ("Preempted sequences.", len(batcher.waiting)),
            "kv_cache_usage_perc": ("KV blocks held: 1 means all.", use),
        }
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=["model_name"])
            gauge.add_metric(model, value)
            yield gauge
        counters = {
            "num_preemptions": ("Sequences preempted.", batcher.preemptions),
            "prefix_cache_queries": ("Tokens looked for in the prefix cache.", batcher.prefix_queried_tokens),
            "prefix_cache_hits": ("Tokens found in the prefix cache.", batcher.prefix_hit_tokens),
        }
        for name, (text, value) in counters.items():
            counter = CounterMetricFamily(f"vllm:{name}", text, labels=["model_name"])
            counter.add_metric(model, value)
            yield counter

    def _counters(self) -> Iterator[Metric]:
        counts = self._counts
        preemptions = self._core.batcher.preemptions
        yield CounterMetricFamily("mell_worker_preemptions", "Sequences preempted.", preemptions)
        yield CounterMetricFamily("mell_worker_steps", "Engine steps.", counts.steps)
        yield CounterMetricFamily("mell_worker_step_seconds", "Time in engine steps.", counts.step_us / 1e6)
        yield CounterMetricFamily("mell_worker_sampled_tokens", "Tokens sampled.", counts.sampled_tokens)
        yield CounterMetricFamily("mell_worker_submissions", "Submissions answered.", counts.submissions)
        yield CounterMetricFamily("mell_worker_refusals", "Submissions refused.", counts.refusals)
        yield CounterMetricFamily("mell_worker_invalid_messages", "Messages not understood.", counts.invalid_messages)
        yield CounterMetricFamily("mell_worker_unsent_messages", "Messages that were not sent.", counts.unsent_messages)

    def _migration(self) -> Iterator[Metric]:
        data = self._data
        moves = CounterMetricFamily("mell_worker_migrations", "Moves ended here.", labels=["mode", "outcome"])
        for labels, count in sorted(self._moves.moves.items()):
            moves.add_metric(labels, count)
        yield moves
        yield from self._moves.registry.collect()
        yield CounterMetricFamily("mell_worker_kv_sent_bytes", "KV sent and confirmed.", data.sent_bytes)
        yield CounterMetricFamily("mell_worker_kv_received_bytes", "KV received.", data.received_bytes)
        yield CounterMetricFamily("mell_worker_kv_unchecked_bytes", "Sent without a checksum.", data.unchecked_bytes)
        failures = CounterMetricFamily("mell_worker_link_failures", "Transfers that failed.", labels=["reason"])
        for reason, count in sorted(data.failures.items()):
            failures.add_metric([reason], count)
        yield failures
        door = CounterMetricFamily("mell_worker_data_port", "Events at the data port.", labels=["event"])
        for event, count in sorted(data.door.items()):
            door.add_metric([event], count)
        yield door
