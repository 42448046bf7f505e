"""The record of one migration at its target."""

from dataclasses import dataclass, field, replace

from mell_gpu_worker.core.events import KvOffered
from mell_gpu_worker.core.migration.tables import Standing, TargetPhase
from mell_gpu_worker.core.sequence import Sequence
from mell_shared.messages.frontend import Claim, Granted
from mell_shared.messages.scheduler import MigrationCommitted
from mell_shared.messages.worker import CommitMigration, KvReserved, ReserveKv


@dataclass(frozen=True, slots=True)
class Question:
    """The source waits to hear that `goal` tokens are computed, until `until_us`."""

    reply_to: str
    goal: int
    until_us: int


@dataclass(slots=True, eq=False)
class Incoming:
    """One sequence on its way here. `reply_to` is where the source waits for a reservation's or a commit's answer."""

    asked: ReserveKv
    sequence: Sequence
    block_tokens: int
    held_tokens: int
    standing: Standing[TargetPhase]
    reply_to: str
    reserved_us: int
    linked: bool = False
    """An offer was made and is not closed yet."""
    offered: KvReserved | None = None
    question: Question | None = None
    arrived: set[int] = field(default_factory=set)
    """Slots that are in place."""
    commit: CommitMigration | None = None
    claim: Claim | None = None
    granted: Granted | None = None
    adopted: bool = False
    """The sequence was known here from the grant on."""
    computed: int = 0
    """How far its own prefill was seen to be."""
    prefilled_us: int = 0
    """When that was seen."""
    committed_us: int = 0
    granted_us: int = 0
    first_token_us: int = 0
    reason: str = ""
    message: str = ""
    """Why nothing is held any more."""

    @property
    def migration(self) -> str:
        """The migration's id."""
        return self.asked.migration

    @property
    def capacity(self) -> int:
        """Tokens that the blocks held have room for."""
        return len(self.sequence.blocks) * self.block_tokens

    def reserved(self, offer: KvOffered | None, step_tokens: int) -> KvReserved:
        """Return what the source needs to know; `offer` is None where only ids can come."""
        return KvReserved(
            held_tokens=self.held_tokens,
            slots=len(self.sequence.blocks) - self.held_tokens // self.block_tokens,
            address=offer.address if offer else "",
            secret=offer.secret if offer else b"",
            size_bytes=offer.size_bytes if offer else 0,
            step_tokens=step_tokens,
        )

    def limit_prefill(self, tokens: int) -> None:
        """Prefill no further than `tokens`, never the last token, nor beyond the blocks."""
        sequence = self.sequence
        sequence.prefill_limit = min(tokens, len(sequence.token_ids) - 1, self.capacity)

    def extend(self, first_index: int, output_ids: list[int]) -> bool:
        """Take in output ids from an index on; False if some before them are missing or they do not fit."""
        sequence = self.sequence
        if first_index > sequence.outputs:
            return False
        fresh = output_ids[sequence.outputs - first_index :]
        if len(sequence.token_ids) + len(fresh) > self.capacity:
            return False
        # A new list: the engine may be reading the old one.
        sequence.token_ids = [*sequence.token_ids, *fresh]
        return True

    @property
    def in_place(self) -> bool:
        """Whether everything that the source named has arrived."""
        return self.commit is not None and self.arrived.issuperset(self.commit.sent_slots)

    @property
    def ready(self) -> bool:
        """Whether the sequence can be computed: all is in place, without a hole before what was sent."""
        if self.commit is None or not self.in_place or self.sequence.in_step:
            return False
        return not self.commit.sent_slots or self.sequence.computed >= self._place(min(self.commit.sent_slots))

    def _place(self, slot: int) -> int:
        """Return the first token of a slot."""
        return self.held_tokens + slot * self.block_tokens

    @property
    def computed_in_all(self) -> int:
        """Tokens whose KV is here, its own and what was sent; the last token's never counts."""
        assert self.commit is not None
        end = self.sequence.computed
        slots = set(self.commit.sent_slots)
        slot = (end - self.held_tokens) // self.block_tokens
        while slot in slots:
            slot += 1
            end = self._place(slot)
        sent = min(end, self.commit.computed_tokens)
        return min(max(self.sequence.computed, sent), len(self.sequence.token_ids) - 1)

    def make_claim(self, worker: str) -> Claim:
        """Return the claim, the same at each repeat."""
        if self.claim is None:
            self.claim = Claim(
                sequence=self.asked.sequence,
                generation=self.asked.generation,
                migration=self.migration,
                source=self.asked.source,
                target=worker,
                length=self.sequence.outputs,
            )
        return self.claim

    def rewound(self, accepted: int) -> Sequence:
        """Return the sequence as it was after `accepted` outputs, to be computed again from there."""
        old = self.sequence
        return replace(
            old,
            token_ids=old.token_ids[: old.prompt_tokens + accepted],
            blocks=[],
            computed=0,
            in_step=False,
            finish_reason=None,
            logprobs=[],
            _digests=[],
        )

    def committed(self, worker: str) -> MigrationCommitted:
        """Return the news that the sequence is here, and what that took."""
        assert self.commit is not None
        assert self.granted is not None
        claim_us, fetched = self.granted_us - self.committed_us, self.sequence.fetched
        # Engines that fetch have whole blocks before a sequence runs.
        ready = self.computed - self.computed % self.block_tokens if fetched.tokens else self.computed
        first_step_us = max(0, self.first_token_us - self.granted_us)
        return MigrationCommitted(
            worker=worker,
            source=self.asked.source,
            migration=self.migration,
            sequence=self.asked.sequence,
            generation=self.granted.generation,
            copied_bytes=self.commit.copied_bytes + fetched.size_bytes,
            copy_us=self.commit.copy_us + fetched.took_us,
            prefilled_tokens=max(0, ready - self.held_tokens - fetched.tokens),
            prefill_us=max(0, self.prefilled_us - self.reserved_us - fetched.took_us),
            stopped_us=self.commit.tail_us + claim_us + first_step_us,
            tail_us=self.commit.tail_us,
            claim_us=claim_us,
            first_step_us=first_step_us,
            mode=self.commit.mode,
        )
