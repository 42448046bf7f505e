"""Writes `metrics.md` from the metrics that the services export: `make docs`; tests hold the two together."""

import asyncio
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric

from mell_frontend.gateway import BusGateway
from mell_frontend.metrics import FrontendMetrics
from mell_frontend.stream.core import FrontendCore
from mell_frontend.stream.limits import StreamLimits
from mell_frontend.stream_metrics import GatewayCollector
from mell_frontend.vllm_metrics import VllmMetrics
from mell_gpu_worker.core.config import WorkerConfig
from mell_gpu_worker.core.worker import WorkerCore
from mell_gpu_worker.metrics import DataCounts, MoveMetrics, WorkerCollector, WorkerCounts
from mell_scheduler.candidate import AlwaysLeads
from mell_scheduler.core import CoreSettings, SchedulerCore
from mell_scheduler.metrics import SchedulerCollector, Tally
from mell_scheduler.policy import PolicySettings, make_policy
from mell_scheduler.service import SchedulerService
from mell_scheduler.settings import SchedulerSettings
from mell_shared.clock import SystemClock
from mell_shared.events.memory import MemoryEventStore
from mell_shared.events.outbox import Outbox, OutboxCollector
from mell_shared.memory_bus import MemoryBroker, MemoryBus
from mell_shared.messages.scheduler import MigrationCommitted, WorkerSpec
from mell_shared.metrics import BusCollector
from mell_shared.subjects import Subjects

PAGE = Path(__file__).with_name("metrics.md")

INTRODUCTION = """\
# Metrics

Every service exports these on `/metrics` (Prometheus): the frontend on its HTTP port, all on `--metrics-port`. Beside
them each has its process's CPU, memory and Python version (`process_*`, `python_info`). How to scrape, show and alert:
[monitoring](monitoring.md). This page is written from the code by `make docs`.

Names that begin with `vllm:` mean what they mean with vLLM (its labels `model_name` and `finished_reason`, its
buckets), so that its dashboards show a Mell cluster: sum over instances. Each is exported by one kind of service, but
for `vllm:num_requests_waiting`: schedulers tell the queue, workers what was preempted; the sum is who waits.

"""


class Exported(NamedTuple):
    """One metric of a service; a counter's samples end in `_total`, a histogram's in `_bucket`, `_sum`, `_count`."""

    name: str
    kind: str
    labels: tuple[str, ...]
    text: str

    @property
    def samples(self) -> tuple[str, ...]:
        """The names that a query can use."""
        if self.kind == "counter":
            return (f"{self.name}_total",)
        if self.kind == "histogram":
            return tuple(f"{self.name}{end}" for end in ("_bucket", "_sum", "_count"))
        return (self.name,)


def exported() -> dict[str, list[Exported]]:
    """Return what each service exports, by name, without what is of its process."""
    return asyncio.run(_exported())


async def _exported() -> dict[str, list[Exported]]:
    """Build on a loop, which a bus needs; nothing runs on it."""
    bus = MemoryBroker(seed=0).connect()
    makers = {"frontend": _frontend, "scheduler": _scheduler, "gpu_worker": _worker}
    return {service: sorted(set(_described(make(bus)))) for service, make in makers.items()}


def _described(registries: Iterable[CollectorRegistry]) -> Iterator[Exported]:
    for registry in registries:
        for collector in registry._collector_to_names:
            parent = getattr(collector, "_labelnames", ())
            for family in collector.collect():
                yield Exported(family.name, family.type, _labels(family, parent), family.documentation)


def _labels(family: Metric, parent: tuple[str, ...]) -> tuple[str, ...]:
    """Return its labels, also where it has no samples yet."""
    own = getattr(family, "_labelnames", None) or parent
    seen = {name for sample in family.samples for name in sample.labels} - {"le"}
    return tuple(own) or tuple(sorted(seen))


def _shared(registry: CollectorRegistry, bus: MemoryBus) -> CollectorRegistry:
    registry.register(BusCollector(bus))
    return registry


def _frontend(bus: MemoryBus) -> list[CollectorRegistry]:
    registry = _shared(CollectorRegistry(), bus)
    FrontendMetrics(registry, frozenset(), VllmMetrics(registry, ["m"]))
    registry.register(GatewayCollector(BusGateway(bus, Subjects(), FrontendCore("f", StreamLimits()), SystemClock())))
    registry.register(OutboxCollector(Outbox(MemoryEventStore(), "", lambda: None)))
    return [registry]


def _scheduler(bus: MemoryBus) -> list[CollectorRegistry]:
    """What a leader exports: its core is made by hand, since only a running one has it."""
    service = SchedulerService(bus, SchedulerSettings(_env_file=None), AlwaysLeads(), process="s", clock=SystemClock())
    _shared(service.registry, bus).register(OutboxCollector(Outbox(MemoryEventStore(), "", lambda: None)))
    core = SchedulerCore(make_policy("repack", PolicySettings()), CoreSettings(), 0)
    leading = CollectorRegistry()
    leading.register(SchedulerCollector(Tally(), lambda: core))
    return [service.registry, leading]


def _worker(bus: MemoryBus) -> list[CollectorRegistry]:
    spec = WorkerSpec(
        worker="w", name="w", host="h", model="m", engine="fake", device="cpu", kv_layout="k",
        max_model_len=64, kv_blocks=16, block_tokens=4, max_sequences=8,
    )  # fmt: skip
    config = WorkerConfig(
        spec=spec, vocab_size=1, eos_token_ids=(0,), max_step_tokens=32, prefix_cache=True, report_interval_us=1,
        status_interval_us=1, frontend_silence_us=1, stop_deadline_us=1,
    )  # fmt: skip
    registry = _shared(CollectorRegistry(), bus)
    moves = MoveMetrics()
    moves.published(MigrationCommitted(worker="w", source="v", migration="1", sequence="s", generation=2))
    registry.register(WorkerCollector(WorkerCore(config, 0), WorkerCounts(), moves, DataCounts()))
    return [registry]


def page() -> str:
    """Return the whole page as Markdown."""
    titles = {"frontend": "Frontend", "scheduler": "Scheduler", "gpu_worker": "GPU worker"}
    return INTRODUCTION + "\n".join("\n".join(_section(titles[name], found)) for name, found in exported().items())


def _section(title: str, found: list[Exported]) -> Iterator[str]:
    yield from (f"## {title}", "", "| metric | type | labels | |", "|---|---|---|---|")
    for metric in found:
        name = metric.samples[0] if metric.kind == "counter" else metric.name
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        yield f"| `{name}` | {metric.kind} | {labels} | {metric.text} |"
    yield ""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
