"""The boundary between a simulated cluster and whatever schedules it: a bare policy, or the live core.

The simulator says what happened and carries out the moves it is given; it decides nothing itself.
"""

from collections.abc import Sequence
from typing import Protocol

from mell_scheduler.policy.base import GpuId, GpuSpec, Item, ItemId, Move, Policy


class Driver(Protocol):
    """What the simulator tells a scheduler and asks of it. Times are virtual microseconds."""

    def gpu_started(self, spec: GpuSpec, now_us: int) -> None:
        """A GPU is up and empty."""

    def gpu_stopped(self, gpu_id: GpuId, now_us: int) -> None:
        """An empty GPU was stopped."""

    def gpus_wanted(self, queued_blocks: int) -> int:
        """How many GPUs should be up, warm spares not counted."""

    def arrived(self, item: Item, now_us: int) -> GpuId | None:
        """Where a request goes now; None if nowhere."""

    def finished(self, item_id: ItemId, now_us: int) -> None:
        """A request ended, was preempted or was cancelled."""

    def reported(self, gpu_id: GpuId, item_ids: Sequence[ItemId], blocks: Sequence[int], now_us: int) -> None:
        """One worker's sizes."""

    def epoch(self, now_us: int) -> list[Move]:
        """The moves of this epoch, most urgent first."""

    def committed(self, move: Move, now_us: int) -> None:
        """A move is done."""

    def failed(self, move: Move, now_us: int) -> None:
        """A move was not carried out."""

    def deferred(self, move: Move, now_us: int) -> None:
        """A move does not begin in this epoch, for want of bandwidth: the next one may plan it again."""


class PolicyDriver:
    """Drives a bare policy: reports are exact and arrive at once."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def gpu_started(self, spec: GpuSpec, now_us: int) -> None:
        """See `Driver`."""
        del now_us
        self.policy.add_gpu(spec)

    def gpu_stopped(self, gpu_id: GpuId, now_us: int) -> None:
        """See `Driver`."""
        del now_us
        lost = self.policy.remove_gpu(gpu_id)
        assert not lost, "the simulator stopped a GPU that holds requests"

    def gpus_wanted(self, queued_blocks: int) -> int:
        """See `Driver`."""
        return self.policy.gpus_wanted(queued_blocks=queued_blocks)

    def arrived(self, item: Item, now_us: int) -> GpuId | None:
        """See `Driver`."""
        del now_us
        return self.policy.allocate(item)

    def finished(self, item_id: ItemId, now_us: int) -> None:
        """See `Driver`."""
        del now_us
        self.policy.depart(item_id)

    def reported(self, gpu_id: GpuId, item_ids: Sequence[ItemId], blocks: Sequence[int], now_us: int) -> None:
        """See `Driver`."""
        del now_us
        strangers = self.policy.update_gpu(gpu_id, item_ids, blocks)
        assert not strangers, "the simulator and the policy disagree on what is where"

    def epoch(self, now_us: int) -> list[Move]:
        """See `Driver`."""
        return self.policy.epoch(now_us)

    def committed(self, move: Move, now_us: int) -> None:
        """See `Driver`."""
        del now_us
        self.policy.moved(move.item_id)

    def failed(self, move: Move, now_us: int) -> None:
        """See `Driver`."""
        del now_us
        self.policy.failed(move.item_id)

    def deferred(self, move: Move, now_us: int) -> None:
        """See `Driver`."""
        del now_us
        self.policy.deferred(move.item_id)
