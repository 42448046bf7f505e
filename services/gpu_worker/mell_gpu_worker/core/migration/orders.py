"""Orders to move a sequence away: whether they can be obeyed, and the move that they begin."""

from collections.abc import Collection

from mell_gpu_worker.core.config import WorkerConfig
from mell_gpu_worker.core.migration.outgoing import Outgoing
from mell_gpu_worker.core.migration.tables import SOURCE_ROLE, begin
from mell_gpu_worker.core.residents import Residents
from mell_gpu_worker.core.sequence import Phase, Sequence
from mell_shared.messages.worker import Migrate, MigrateRefused


class Orders:
    """What an order is judged by, and made into."""

    def __init__(self, config: WorkerConfig, residents: Residents) -> None:
        self._spec = config.spec
        self._fetches = config.can.kv == "fetched"
        self._limits = config.moves
        self._residents = residents

    def refusal(self, migrate: Migrate, moving: Collection[Outgoing]) -> MigrateRefused | None:
        """Return why an order cannot be obeyed now, given what moves already, or None."""
        reason, message = self._fault(migrate, moving)
        return MigrateRefused(reason=reason, message=message) if reason else None

    def _fault(self, migrate: Migrate, moving: Collection[Outgoing]) -> tuple[str, str]:
        modes = self._spec.migration_modes
        if migrate.mode not in modes:
            return "unsupported", f"this worker moves by {', '.join(modes) or 'no mode'}, not by {migrate.mode}"
        if migrate.target == self._spec.worker:
            return "unsupported", "it is here already"
        sequence = self._residents.streams.find(migrate.sequence, migrate.generation)
        if sequence is not None:
            return self._fault_of(sequence, migrate, moving)
        newest = self._residents.streams.newest_generation(migrate.sequence)
        if newest:
            return "superseded", f"generation {migrate.generation} is not here; the last one was {newest}"
        return "unknown", "no such sequence is here"

    def _fault_of(self, sequence: Sequence, migrate: Migrate, moving: Collection[Outgoing]) -> tuple[str, str]:
        if not sequence.live:
            return "ended", "it has ended"
        if any(move.sequence is sequence for move in moving):
            return "busy", "it is moving already"
        if sequence.phase is Phase.WAITING and migrate.mode != "tokens":
            return "preempted", "it was preempted and holds no KV: it can be moved by tokens only"
        if len(moving) >= self._limits.max_outgoing:
            return "busy", f"{len(moving)} sequences are being moved from here already"
        return "", ""

    def begin(self, migrate: Migrate, now_us: int) -> Outgoing:
        """Return the move that an order, which was not refused, begins."""
        sequence = self._residents.streams.find(migrate.sequence, migrate.generation)
        assert sequence is not None, "the order was refused"
        size = self._spec.block_tokens
        # Ordered by an older size; at least the last token is left to compute.
        split = min(migrate.split_tokens, len(sequence.token_ids) - 1) // size * size
        mode = "kv" if migrate.mode == "hybrid" and not split else migrate.mode
        return Outgoing(
            migrate,
            self._spec.worker,
            sequence,
            size,
            begin(SOURCE_ROLE, now_us, self._limits),
            mode,
            self._fetches,
            split_tokens=split if mode == "hybrid" else 0,
            known_outputs=sequence.outputs,
            outputs=sequence.outputs,
            token_us=self._residents.stepped_us,
        )
