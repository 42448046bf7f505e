"""The worker's metrics: counters that its shell keeps, and gauges read from the core when asked."""

from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mell_gpu_worker.core.step import StepResult
from mell_gpu_worker.core.worker import WorkerCore
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


class WorkerCollector(Collector):
    """A worker's state as metrics."""

    def __init__(self, core: WorkerCore, counts: WorkerCounts) -> None:
        self._core = core
        self._counts = counts

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics as they are now."""
        yield from self._gauges()
        yield from self._counters()

    def _gauges(self) -> Iterator[Metric]:
        batcher = self._core.batcher
        yield GaugeMetricFamily("mell_worker_running", "Sequences running.", len(batcher.running))
        yield GaugeMetricFamily("mell_worker_waiting", "Preempted sequences.", len(batcher.waiting))
        yield GaugeMetricFamily("mell_worker_kv_blocks", "KV blocks of the pool.", batcher.pool.kv_blocks)
        yield GaugeMetricFamily("mell_worker_kv_blocks_used", "KV blocks held.", batcher.pool.used_blocks)
        yield GaugeMetricFamily("mell_worker_draining", "1 while nothing new is taken.", int(self._core.draining))

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
