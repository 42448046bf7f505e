"""How well the cluster is packed, live: GPUs in use against the volume bound, which no packing can beat."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mell_scheduler.core import SchedulerCore


@dataclass(slots=True)
class Packing:
    """One model's packing: now, and summed over the time that this scheduler has led."""

    joined: int = 0
    """Workers that are known."""
    active: int = 0
    """Of these, those that hold something."""
    bound: int = 0
    active_s: float = 0.0
    bound_s: float = 0.0

    @property
    def ratio(self) -> float:
        """Active workers over the bound; 1 where nothing is held."""
        return self.active / self.bound if self.bound else 1.0


class PackingMeter(Collector):
    """Looks once an epoch; between two looks what was seen last counts."""

    def __init__(self) -> None:
        self._models: dict[str, Packing] = {}
        self._seen_us: int | None = None

    def look(self, core: SchedulerCore, now_us: int) -> None:
        """Take the cluster as it is now."""
        passed_s = 0.0 if self._seen_us is None else (now_us - self._seen_us) / 1e6
        self._seen_us = now_us
        for packing in self._models.values():
            packing.active_s += packing.active * passed_s
            packing.bound_s += packing.bound * passed_s
            packing.joined = packing.active = packing.bound = 0
        for name, model in core.ledger.models.items():
            packing = self._models.setdefault(name, Packing())
            workers = list(model.workers.values())
            packing.joined = len(workers)
            packing.active = sum(worker.load > 0 for worker in workers)
            used_blocks = sum(worker.used_blocks for worker in workers)
            packing.bound = volume_bound(used_blocks, (worker.spec.kv_blocks for worker in workers))

    def forget(self) -> None:
        """This scheduler leads no more: time that passes is another's."""
        self._seen_us = None
        for packing in self._models.values():
            packing.joined = packing.active = packing.bound = 0

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics as seen last."""
        yield self._gauge("mell_gpus_joined", "Workers that are up, by model.", "joined")
        yield self._gauge("mell_gpus_active", "Workers that hold something, by model.", "active")
        yield self._gauge("mell_gpus_volume_bound", "Least workers whose KV could hold all that is held.", "bound")
        yield self._gauge("mell_packing_ratio", "Active workers over the volume bound.", "ratio")
        yield self._counter("mell_gpu_seconds", "Time of active workers.", "active_s")
        yield self._counter("mell_gpu_volume_bound_seconds", "The same of the volume bound.", "bound_s")

    def _gauge(self, name: str, text: str, field: str) -> GaugeMetricFamily:
        family = GaugeMetricFamily(name, text, labels=["model"])
        for model, packing in self._models.items():
            family.add_metric([model], getattr(packing, field))
        return family

    def _counter(self, name: str, text: str, field: str) -> CounterMetricFamily:
        family = CounterMetricFamily(name, text, labels=["model"])
        for model, packing in self._models.items():
            family.add_metric([model], getattr(packing, field))
        return family


def volume_bound(used_blocks: int, capacities: Iterable[int]) -> int:
    """Return how many of the workers, the largest first, it takes to hold so many blocks."""
    count = 0
    for capacity in sorted(capacities, reverse=True):
        if used_blocks <= 0:
            break
        used_blocks -= capacity
        count += 1
    return count
