"""Meters GPU-time, what is used and what the shadow would use: counted once an epoch."""

from collections import deque

from mell_scheduler.core.ledger import Ledger
from mell_scheduler.core.shadow import Shadow
from mell_shared.messages.admin import GpuUse

_SAMPLES = 300


class Usage:
    """Adds up GPUs times time; a count holds until the next review."""

    def __init__(self, ledger: Ledger, shadow: Shadow | None, now_us: int) -> None:
        self._ledger = ledger
        self._shadow = shadow
        self._since_us = self._counted_us = now_us
        self._up = self._used = self._shadowed = 0
        self._up_gpu_us = self._used_gpu_us = self._shadow_gpu_us = 0
        self.used_lately: deque[int] = deque(maxlen=_SAMPLES)
        self.shadow_lately: deque[int] = deque(maxlen=_SAMPLES)

    def passed(self) -> None:
        """Time has passed: the shadow does a part of its work."""
        if self._shadow is not None:
            self._shadow.look(self._ledger.sequences)

    def review(self, now_us: int) -> None:
        """An epoch has passed: charge it with what was counted at its beginning, and count anew."""
        passed_us, self._counted_us = now_us - self._counted_us, now_us
        self._up_gpu_us += passed_us * self._up
        self._used_gpu_us += passed_us * self._used
        self._up, self._used = len(self._ledger.workers), self._busy()
        self.used_lately.append(self._used)
        if self._shadow is not None:
            self._shadow_gpu_us += passed_us * self._shadowed
            self._shadowed = self._shadow.used
            self.shadow_lately.append(self._shadowed)
            self._shadow.begin_round(self._ledger.workers.values())

    def _busy(self) -> int:
        """Workers that hold something, or are about to."""
        targets = {record.migration.target for record in self._ledger.moving.values() if record.migration}
        return sum(bool(worker.load) or name in targets for name, worker in self._ledger.workers.items())

    def told(self, now_us: int) -> GpuUse:
        """Return the sums as operators see them."""
        shadow = self._shadow
        return GpuUse(
            since_s=(now_us - self._since_us) / 1e6,
            up=self._up,
            used=self._used,
            up_gpu_s=self._up_gpu_us / 1e6,
            used_gpu_s=self._used_gpu_us / 1e6,
            shadow_policy="" if shadow is None else shadow.name,
            shadow=self._shadowed,
            shadow_gpu_s=self._shadow_gpu_us / 1e6,
            shadow_preemptions=0 if shadow is None else shadow.preemptions,
        )
