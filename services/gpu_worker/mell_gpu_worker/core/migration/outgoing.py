"""The record of one migration at its source."""

from dataclasses import dataclass
from enum import Enum

from mell_gpu_worker.core.config import WorkerConfig
from mell_gpu_worker.core.migration.copying import CatchingUp, Copying
from mell_gpu_worker.core.migration.tables import SourcePhase, Standing
from mell_gpu_worker.core.sequence import Sequence
from mell_shared.messages.base import MigrationMode
from mell_shared.messages.frontend import AbortMigration
from mell_shared.messages.scheduler import MigrationFailed
from mell_shared.messages.worker import (
    CommitMigration,
    ExtendKv,
    KvReserved,
    Migrate,
    PeerCommand,
    ReserveKv,
)

LOGPROBS_TOLD = 64
"""Outputs at the end whose log-probabilities go along: a frontend lags that far behind only if messages were lost."""


_LEAST_GROWTH = 8
"""Room asked for beyond the tokens so far even where the plan left none: a few steps."""


class LinkState(Enum):
    """This end of a migration's transfer."""

    NONE = "none"
    OPENING = "opening"
    OPEN = "open"


@dataclass(slots=True, eq=False)
class Outgoing:
    """One sequence on its way from here. `copying`, `catching` are there if its mode wants blocks sent, ids told."""

    order: Migrate
    source: str
    sequence: Sequence
    block_tokens: int
    standing: Standing[SourcePhase]
    mode: MigrationMode
    fetches: bool = False
    """By `kv` the target's engine fetches."""
    split_tokens: int = 0
    held: KvReserved | None = None
    copying: Copying | None = None
    catching: CatchingUp | None = None
    freezing: bool = False
    """The target was told to prefill no further, for its blocks are to be sent instead."""
    link: LinkState = LinkState.NONE
    question: PeerCommand | None = None
    """What the target has not answered yet."""
    misses: int = 0
    """Questions in a row that it did not answer."""
    known_outputs: int = 0
    """Outputs that the target knows for sure."""
    outputs: int = 0
    token_us: int = 0
    """When its last token was made."""
    reason: str = ""
    message: str = ""
    """Why it fails, if it does."""

    @property
    def by_ids(self) -> bool:
        """Whether only ids go to the target, which sees to the KV itself."""
        return self.mode == "tokens" or (self.mode == "kv" and self.fetches)

    @property
    def needs_blocks(self) -> bool:
        """Whether what lies in its blocks here is still to be sent: by ids it can go on without any."""
        return not self.by_ids or self.freezing

    @property
    def migration(self) -> str:
        """The migration's id."""
        return self.order.migration

    @property
    def target(self) -> str:
        """The worker it moves to."""
        return self.order.target

    @property
    def full_blocks(self) -> int:
        """Blocks whose content will not change any more."""
        return self.sequence.computed // self.block_tokens

    @property
    def used_blocks(self) -> int:
        """Blocks with any content."""
        return -(-self.sequence.computed // self.block_tokens)

    @property
    def first_slot_block(self) -> int:
        """The block that the offer's first slot is for."""
        assert self.held is not None
        return self.held.held_tokens // self.block_tokens

    @property
    def room_tokens(self) -> int:
        """Tokens beyond those the sequence has for which there is room at the target; negative if it outgrew that."""
        assert self.held is not None
        room = self.held.held_tokens + self.held.slots * self.block_tokens
        return room - len(self.sequence.token_ids)

    @property
    def fits(self) -> bool:
        """Whether all blocks that are to be sent have a place at the target; by ids none is."""
        return not self.needs_blocks or self.room_tokens >= 0

    def reserve(self, config: WorkerConfig, now_us: int) -> ReserveKv:
        """Return the question for room: what the plan counts on, if it says, with growth within the limits."""
        sequence, growth_tokens = self.sequence, config.moves.growth_tokens
        if self.order.planned_tokens:
            planned = self.order.planned_tokens - len(sequence.token_ids)
            growth_tokens = max(_LEAST_GROWTH, min(planned, growth_tokens))
        return ReserveKv(
            migration=self.migration,
            sequence=sequence.sequence,
            generation=sequence.generation,
            source=self.source,
            frontend=sequence.frontend,
            model=config.spec.model,
            kv_layout=config.spec.kv_layout,
            block_tokens=self.block_tokens,
            prompt_ids=sequence.token_ids[: sequence.prompt_tokens],
            output_ids=sequence.output_ids(),
            sampling=sequence.sampling,
            priority=-sequence.order.negated_priority,
            age_us=now_us - sequence.order.since_us,
            max_outputs=sequence.max_outputs,
            cached_tokens=sequence.cached_tokens,
            mode=self.mode,
            split_tokens=self.split_tokens,
            growth_tokens=min(growth_tokens, sequence.max_outputs - sequence.outputs),
            kv_source=config.kv_source if self.mode == "kv" else "",
        )

    def extend(self) -> ExtendKv:
        """Return the question how far the target is; tells it what ids it may compute by now."""
        assert self.catching is not None
        self.catching.number += 1
        told_outputs = self.catching.told - self.sequence.prompt_tokens
        return ExtendKv(
            migration=self.migration,
            number=self.catching.number,
            first_index=self.known_outputs,
            output_ids=self.sequence.output_ids(self.known_outputs)[: max(0, told_outputs - self.known_outputs)],
            prefill_tokens=0 if self.freezing else self.catching.goal,
        )

    def commit(self, now_us: int) -> CommitMigration:
        """Return the order to take the sequence, which stands still, over."""
        sequence, copying = self.sequence, self.copying
        first = self.first_slot_block
        slots = [] if copying is None else list(range(copying.first - first, copying.sent - first))
        return CommitMigration(
            migration=self.migration,
            first_index=self.known_outputs,
            output_ids=sequence.output_ids(self.known_outputs),
            computed_tokens=sequence.computed,
            sent_slots=slots,
            logprobs=tuple(sequence.logprobs[-LOGPROBS_TOLD:]),
            copied_bytes=copying.size_bytes if copying else 0,
            copy_us=copying.took_us if copying else 0,
            mode=self.mode,
            tail_us=now_us - self.token_us if sequence.outputs else 0,
        )

    def abort(self) -> AbortMigration:
        """Return the wish that the target's claim never be granted."""
        return AbortMigration(
            sequence=self.sequence.sequence,
            generation=self.order.generation,
            migration=self.migration,
            source=self.source,
        )

    def failed(self) -> MigrationFailed:
        """Return the news that the sequence stays."""
        return MigrationFailed(
            worker=self.source,
            migration=self.migration,
            sequence=self.sequence.sequence,
            generation=self.order.generation,
            reason=self.reason,
            message=self.message,
            mode=self.mode,
        )
