"""What another policy would need for the same requests: a packing that nobody carries out, kept beside the real one.

It moves nothing and has as many GPUs as it likes, so it tells what serving without moves would cost. It is fed what was
placed, how it has grown by each epoch, and when it ended. What that costs is bounded: one search for each placement and
end, and with each tick a look at `MOST_LOOKS` sequences and GPUs at most; the others' turn comes with the next.
"""

from collections.abc import Iterable, Mapping
from itertools import islice

from mell_scheduler.core.records import SequenceRecord, WorkerRecord
from mell_scheduler.policy.base import GpuId, GpuSpec, GpuState, Item, Policy

MOST_LOOKS = 2_000
_PLACEMENT_LOOKS = 20
"""What a placement costs, in looks."""


class Shadow:
    """Holds each known sequence once, on a GPU of its own imagination."""

    def __init__(self, policy: Policy) -> None:
        """Take a policy that moves nothing, and is used by nobody else."""
        self._policy = policy
        self._gpus = 0
        self._turn: list[GpuId] = []
        """Whose sizes are looked at next, the last first."""
        self._shared: dict[str, float] = {}
        self._found: dict[str, tuple[SequenceRecord, GpuSpec]] = {}
        """Known from a report, and placed when their size is."""
        self.preemptions = 0
        """Sequences that outgrew their GPU, and were placed anew."""

    @property
    def name(self) -> str:
        """The policy's."""
        return self._policy.name

    @property
    def used(self) -> int:
        """GPUs that hold something."""
        return sum(self._policy.state(gpu_id) is GpuState.ACTIVE for gpu_id in self._policy.gpu_ids())

    def arrived(self, record: SequenceRecord, spec: GpuSpec) -> None:
        """A sequence was placed; `spec` describes the GPU that it is on."""
        self._put(Item(record.sequence, record.size_blocks, spec.model), spec)

    def found(self, record: SequenceRecord, spec: GpuSpec) -> None:
        """A sequence that somebody else placed is being reported."""
        self._found[record.sequence] = (record, spec)

    def gone(self, sequence: str) -> None:
        """It holds nothing any more."""
        if self._found.pop(sequence, None) is None:
            self._policy.depart(sequence)

    def begin_round(self, workers: Iterable[WorkerRecord]) -> None:
        """An epoch has passed: look at every GPU once more, unless that is still going on."""
        self._shared = _shares(workers)
        self._turn = self._turn or self._policy.gpu_ids()

    def look(self, sequences: Mapping[str, SequenceRecord]) -> None:
        """Take sizes, and place anew what outgrew its GPU, as far as it may take in one go."""
        looks = self._take_found()
        while self._turn and looks < MOST_LOOKS:
            gpu_id = self._turn.pop()
            names = self._policy.items_on(gpu_id)
            looks += 1 + len(names)
            if names:
                share = self._shared.get(self._policy.spec(gpu_id).model, 0.0)
                looks += _PLACEMENT_LOOKS * self._resize(gpu_id, [sequences[name] for name in names], share)

    def _take_found(self) -> int:
        """Place those whose size is known by now; returns what it took, in looks."""
        now = list(islice(self._found, MOST_LOOKS // _PLACEMENT_LOOKS))
        for name in now:
            self.arrived(*self._found.pop(name))
        return _PLACEMENT_LOOKS * len(now)

    def _resize(self, gpu_id: GpuId, records: list[SequenceRecord], share: float) -> int:
        """Charge what is predicted, as the real policy does, and relieve by what is used, as a worker would.

        Returns how many were placed anew.
        """
        names = [record.sequence for record in records]
        self._policy.update_gpu(gpu_id, names, [record.size_blocks for record in records])
        self._policy.set_other_blocks(gpu_id, -int(share * sum(record.size_blocks for record in records)))
        spec = self._policy.spec(gpu_id)
        used = (1 - share) * sum(record.blocks for record in records)
        before = len(records)
        while used > spec.capacity_blocks and len(records) > 1:
            latest = records.pop()
            used -= (1 - share) * latest.blocks
            self._policy.depart(latest.sequence)
            self._put(Item(latest.sequence, latest.size_blocks, spec.model), spec, barred=(gpu_id,))
        preempted = before - len(records)
        self.preemptions += preempted
        return preempted

    def _put(self, item: Item, spec: GpuSpec, barred: tuple[GpuId, ...] = ()) -> None:
        """Where the policy would place it, on one GPU more if need be."""
        if self._policy.allocate(item, barred) is not None:
            return
        self._gpus += 1
        gpu_id = f"{self._gpus}"
        self._policy.add_gpu(GpuSpec(gpu_id, spec.capacity_blocks, spec.model, step=spec.step, fixed=spec.fixed))
        self._policy.place(item, gpu_id)

    def check(self, sequences: Mapping[str, SequenceRecord]) -> None:
        """Assert that it holds exactly what is known. For tests; slow."""
        self._policy.check()
        held = [name for gpu_id in self._policy.gpu_ids() for name in self._policy.items_on(gpu_id)]
        assert sorted([*held, *self._found]) == sorted(sequences), "the shadow holds something else than is known"


def _shares(workers: Iterable[WorkerRecord]) -> dict[str, float]:
    """Of each pool, the share of blocks that sequences count and others hold too: prefixes are shared there as here."""
    shared: dict[str, int] = {}
    counted: dict[str, int] = {}
    for worker in workers:
        shared[worker.pool] = shared.get(worker.pool, 0) + worker.shared_blocks
        counted[worker.pool] = counted.get(worker.pool, 0) + worker.used_blocks + worker.shared_blocks
    return {pool: shared[pool] / counted[pool] for pool in shared if shared[pool]}
