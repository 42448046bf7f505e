"""What a migration's source sends next: which blocks (sweep by sweep) and which ids (round by round)."""

from dataclasses import dataclass

_FEW_TOKENS = 8
"""So few more in the target's first step are as good as none."""
_SLOWER = 8
"""How many times as long as those before, for its size, the tail may take."""
_STALLS = 4
"""Answers without any progress before prefill at the target is given up."""


@dataclass(slots=True)
class Copying:
    """Blocks [`first`, ...) of a sequence on their way, each sent once. A sweep takes what is full at its beginning.

    Counts blocks by their place in the sequence. [first, sent) is confirmed, [sent, sending) is under way.
    """

    first: int
    sent: int = -1
    sending: int = -1
    sweep_end: int = -1
    sweeps: int = 0
    size_bytes: int = 0
    took_us: int = 0

    def __post_init__(self) -> None:
        self.sent = self.sending = self.sweep_end = self.first

    @property
    def busy(self) -> bool:
        """Whether blocks are under way."""
        return self.sending > self.sent

    def tail_small(self, full_blocks: int, most_sweeps: int) -> bool:
        """Whether so little is left, or so much was tried, that the sequence should stop for the rest."""
        if self.busy or self.sent < self.sweep_end:
            return False
        return full_blocks - self.sent <= 1 or self.sweeps >= most_sweeps

    def next_blocks(self, full_blocks: int, most: int) -> range:
        """Return the blocks to send now, at most `most` of the `full_blocks` that will not change any more."""
        if self.busy:
            return range(0)
        if self.sent >= self.sweep_end < full_blocks:
            self.sweep_end = full_blocks
            self.sweeps += 1
        blocks = range(self.sent, min(self.sweep_end, self.sent + most))
        self.sending = max(self.sent, blocks.stop)
        return blocks

    def tail_timeout_us(self, blocks: int, least_us: int, most_us: int) -> int:
        """Return how long the last blocks may take: as those before would have let expect, within bounds."""
        sent = self.sent - self.first
        if not sent:
            return most_us
        return min(most_us, max(least_us, _SLOWER * self.took_us * blocks // sent))

    def confirm(self, size_bytes: int, took_us: int) -> None:
        """Take note that what was under way is in place."""
        self.sent = self.sending
        self.size_bytes += size_bytes
        self.took_us += took_us


@dataclass(slots=True)
class CatchingUp:
    """Prefill at the target: told [0, `told`) tokens, it is to compute [0, `goal`); it has computed `computed`."""

    told: int
    goal: int
    computed: int
    rounds: int = 1
    number: int = 0
    """Of the next question."""
    round_tokens: int = 0
    """How many tokens this round had to compute."""
    stalls: int = 0

    def __post_init__(self) -> None:
        self.round_tokens = self.goal - self.computed

    @property
    def reached(self) -> bool:
        """Whether the target has computed all that it was to."""
        return self.computed >= self.goal

    @property
    def stalled(self) -> bool:
        """Whether the target does not get on."""
        return self.stalls >= _STALLS

    def answered(self, computed: int) -> None:
        """Take note how far the target is."""
        self.stalls = self.stalls + 1 if computed <= self.computed else 0
        self.computed = max(self.computed, computed)

    def tail_small(self, tokens: int, step_tokens: int, most_rounds: int) -> bool:
        """Whether the sequence, `tokens` long by now, should stop, so that the target computes the rest at once.

        `step_tokens`: what it can prefill in one step.
        """
        rest = tokens - self.told
        return self.reached and (rest <= _FEW_TOKENS or (rest <= step_tokens and self.exhausted(tokens, most_rounds)))

    def exhausted(self, tokens: int, most_rounds: int) -> bool:
        """Whether another round would not be less than half of this one, or there were enough."""
        return 2 * (tokens - self.told) >= self.round_tokens or self.rounds >= most_rounds

    def next_round(self, tokens: int) -> None:
        """Tell the target all `tokens` tokens, and let it compute all but the last."""
        self.rounds += 1
        self.round_tokens = tokens - 1 - self.goal
        self.told, self.goal = tokens, tokens - 1
