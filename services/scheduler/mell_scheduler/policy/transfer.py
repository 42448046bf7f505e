"""Adaptive transfer (MELL §V): divides an epoch's moves between copying KV, prefilling again, and both.

Two boundaries, both shared by all moves of an epoch and profiled, then kept current from what was seen:
the bytes that each link carries in the time limit, and the tokens that each target can prefill without
hurting its decodes. The division is a greedy two-bin packing over all moves at once. Hybrid recomputes
[0, x) at the target while the KV of [x, n) travels; causal attention makes the two independent.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from math import isfinite

from mell_scheduler.policy.base import GpuId, Move

LinkId = str

_DOUBLING_US = 60_000_000
_MOST_DOUBLINGS = 40


class Mode(Enum):
    """How a sequence's state gets to the target."""

    KV = "kv"
    TOKENS = "tokens"
    HYBRID = "hybrid"


ALL_MODES = frozenset(Mode)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A planned move and what it would cost. `links` are all that its KV crosses, each shared with others."""

    move: Move
    tokens: int
    """What the target must hold and does not: cached prefixes are not counted."""
    bytes_per_token: int
    links: tuple[LinkId, ...]
    modes: frozenset[Mode] = ALL_MODES


@dataclass(frozen=True, slots=True)
class Budgets:
    """An epoch's boundaries, and what an operator allows besides. A link or worker not named has none left."""

    link_bytes: Mapping[LinkId, int]
    prefill_tokens: Mapping[GpuId, int]
    limit_us: int
    """The time in which links and workers must get through their budgets."""
    max_moves: int = 1 << 30
    max_bytes: int = 1 << 60
    block_tokens: int = 16
    """The unit of KV transfer: a hybrid splits between blocks."""
    link_moves: Mapping[LinkId, int] = field(default_factory=dict)
    """How many more moves a link takes at once, whatever their mode; one not named takes any number."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """How one move is carried out: prefill [0, recomputed_tokens), copy the rest."""

    move: Move
    mode: Mode
    recomputed_tokens: int
    copied_bytes: int
    predicted_us: int
    """The later of both halves, each at its boundary's rate, alone; 0 where there is no rate."""


@dataclass(frozen=True, slots=True)
class Division:
    """An epoch's transfers in order of urgency, and the moves that must wait for another epoch."""

    transfers: list[Transfer]
    deferred: list[Move]


def divide(candidates: Sequence[Candidate], budgets: Budgets) -> Division:
    """Divide moves: by urgency, then those first that lose most in the wrong bin; the rest is deferred."""
    rooms = _Rooms(budgets)
    order = sorted(
        range(len(candidates)),
        key=lambda at: (candidates[at].move.priority, -rooms.cost_difference(candidates[at]), at),
    )
    transfers: list[Transfer] = []
    deferred: list[Move] = []
    for at in order:
        transfer = rooms.fit(candidates[at])
        if transfer is None:
            deferred.append(candidates[at].move)
        else:
            rooms.take(candidates[at], transfer)
            transfers.append(transfer)
    return Division(transfers, deferred)


def directed(candidate: Candidate, budgets: Budgets, mode: Mode | None) -> Transfer:
    """One move that is to be made whatever room there is: in this mode, else as `divide` would, else in the quickest.

    A link or target without any budget has no rate: then the prediction is 0, unknown.
    """
    rooms = _Rooms(budgets)
    if mode is not None:
        return rooms.transfer_in(candidate, mode)
    fitting = rooms.fit(candidate)
    if fitting is not None:
        return fitting
    every = [rooms.transfer_in(candidate, each) for each in Mode if each in candidate.modes]
    return min(every, key=lambda transfer: transfer.predicted_us or 1 << 62)


def split_point(tokens: int, copy_us_per_token: float, prefill_us_per_token: float, block_tokens: int) -> int:
    """The x at which prefilling [0, x) and copying [x, tokens) end together, at a block's boundary."""
    total_us = copy_us_per_token + prefill_us_per_token
    exact = tokens * copy_us_per_token / total_us if total_us > 0 else 0.0
    return min(tokens, round(exact / block_tokens) * block_tokens)


class _Rooms:
    """What is left of the budgets while moves are divided."""

    def __init__(self, budgets: Budgets) -> None:
        self._budgets = budgets
        self._links = dict(budgets.link_bytes)
        self._prefill = dict(budgets.prefill_tokens)
        self._moves = budgets.max_moves
        self._link_moves = dict(budgets.link_moves)
        self._bytes = budgets.max_bytes

    def cost_difference(self, candidate: Candidate) -> float:
        """How much of the epoch is lost in the dearer bin."""
        copy_us, prefill_us = self._copy_us(candidate), self._prefill_us(candidate)
        return 0.0 if copy_us == prefill_us else abs(copy_us - prefill_us) * candidate.tokens

    def fit(self, candidate: Candidate) -> Transfer | None:
        """The cheaper bin if it has room, else the other, else both; None if neither has."""
        if self._moves <= 0 or any(self._link_moves.get(link, 1) <= 0 for link in candidate.links):
            return None
        copy_first = self._copy_us(candidate) <= self._prefill_us(candidate)
        order = (Mode.KV, Mode.TOKENS) if copy_first else (Mode.TOKENS, Mode.KV)
        for mode in order:
            recomputed = 0 if mode is Mode.KV else candidate.tokens
            if mode in candidate.modes and self._has_room(candidate, recomputed):
                return self._transfer(candidate, mode, recomputed)
        return self._hybrid(candidate) if Mode.HYBRID in candidate.modes else None

    def _hybrid(self, candidate: Candidate) -> Transfer | None:
        """The split by equal ends, shifted as far as the budgets need."""
        block = self._budgets.block_tokens
        least = max(block, -(-(candidate.tokens - self._copyable(candidate)) // block) * block)
        most = min(self._prefill.get(candidate.move.target, 0), candidate.tokens - 1) // block * block
        if least > most:
            return None
        even = split_point(candidate.tokens, self._copy_us(candidate), self._prefill_us(candidate), block)
        return self._transfer(candidate, Mode.HYBRID, min(max(even, least), most))

    def transfer_in(self, candidate: Candidate, mode: Mode) -> Transfer:
        """The transfer in a mode, at the boundaries' rates, whatever room there is."""
        recomputed = 0 if mode is Mode.KV else candidate.tokens
        if mode is Mode.HYBRID:
            block = self._budgets.block_tokens
            copy_us, prefill_us = self._copy_us(candidate), self._prefill_us(candidate)
            known = isfinite(copy_us) and isfinite(prefill_us)
            even = split_point(candidate.tokens, copy_us, prefill_us, block) if known else candidate.tokens // 2
            # Something of each, as far as there are blocks for it.
            recomputed = max(block, min(even, candidate.tokens - 1) // block * block)
        return self._transfer(candidate, mode, min(recomputed, candidate.tokens))

    def _copyable(self, candidate: Candidate) -> int:
        """Tokens whose KV all links can still carry."""
        rooms = [self._links.get(link, 0) for link in candidate.links]
        return min([*rooms, self._bytes]) // candidate.bytes_per_token

    def _has_room(self, candidate: Candidate, recomputed: int) -> bool:
        copied = candidate.tokens - recomputed
        prefill_room = self._prefill.get(candidate.move.target, 0)
        return recomputed <= prefill_room and copied <= (self._copyable(candidate) if copied else 0)

    def _transfer(self, candidate: Candidate, mode: Mode, recomputed: int) -> Transfer:
        copied = candidate.tokens - recomputed
        copy_us = copied * self._copy_us(candidate) if copied else 0.0
        prefill_us = recomputed * self._prefill_us(candidate) if recomputed else 0.0
        longer_us = max(copy_us, prefill_us)
        predicted_us = round(longer_us) if isfinite(longer_us) else 0
        return Transfer(candidate.move, mode, recomputed, copied * candidate.bytes_per_token, predicted_us)

    def take(self, candidate: Candidate, transfer: Transfer) -> None:
        """Charge a transfer to every budget it uses."""
        for link in candidate.links:
            self._links[link] = self._links.get(link, 0) - transfer.copied_bytes
            if link in self._link_moves:
                self._link_moves[link] -= 1
        target = transfer.move.target
        self._prefill[target] = self._prefill.get(target, 0) - transfer.recomputed_tokens
        self._moves -= 1
        self._bytes -= transfer.copied_bytes

    def _copy_us(self, candidate: Candidate) -> float:
        """Per token, over the slowest link at its profiled rate."""
        slowest = min((self._budgets.link_bytes.get(link, 0) for link in candidate.links), default=0)
        return candidate.bytes_per_token * self._budgets.limit_us / slowest if slowest > 0 else float("inf")

    def _prefill_us(self, candidate: Candidate) -> float:
        """Per token, at the target's profiled rate."""
        tokens = self._budgets.prefill_tokens.get(candidate.move.target, 0)
        return self._budgets.limit_us / tokens if tokens > 0 else float("inf")


@dataclass(slots=True)
class RateEstimate:
    """A boundary's rate per second: profiled at `seen_us`, then an exponential mean of what was seen.

    What looks too slow is not used, so nothing would ever correct it: each minute without news it counts for twice as
    much, up to `ceiling_per_s`, until a move is tried again and tells.
    """

    per_s: float
    ceiling_per_s: float
    seen_us: int = 0
    weight: float = 0.2
    """Of each observation."""
    least: int = 1
    """Smaller amounts say nothing: what they took is latency."""

    def observe(self, amount: int, took_us: int, now_us: int) -> None:
        """A transfer or prefill of `amount` took this long."""
        if took_us > 0 and amount >= self.least:
            self.per_s += self.weight * (amount * 1e6 / took_us - self.per_s)
            self.seen_us = now_us

    def budget(self, limit_us: int, now_us: int) -> int:
        """What fits into a time limit."""
        doublings = min((now_us - self.seen_us) // _DOUBLING_US, _MOST_DOUBLINGS)
        trusted_per_s = max(self.per_s, min(self.per_s * (1 << doublings), self.ceiling_per_s))
        return int(trusted_per_s * limit_us / 1e6)


@dataclass(frozen=True, slots=True)
class PrefillProfile:
    """Tokens per second that a worker can prefill beside its decodes, by batch size; measured at start."""

    tokens_per_s: tuple[tuple[int, float], ...]
    """(batch, rate), ascending by batch."""

    def rate_at(self, batch: int) -> float:
        """The rate at the next greater batch that was measured; beyond the last one, none."""
        return next((rate for measured, rate in self.tokens_per_s if batch <= measured), 0.0)

    def batch_at(self, batch: int) -> int:
        """The next greater batch that was measured; 0 beyond the last one."""
        return next((measured for measured, _ in self.tokens_per_s if batch <= measured), 0)
