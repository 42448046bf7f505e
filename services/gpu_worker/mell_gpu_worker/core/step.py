"""What the core asks of an engine for one step, and what comes back: plain values, nothing kept between steps.

Rows and tokens are made once for every token: a frozen dataclass would take more than twice as long to make.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from mell_shared.messages.frontend import TokenLogprobs
from mell_shared.messages.sampling import FinishReason, SamplingParams


@dataclass(slots=True)
class StepRow:
    """One sequence's part of a step: compute the KV of tokens [start, start + count), perhaps sample the next.

    `token_ids` is the prompt and all output so far, read only and valid during the step; the first
    `prompt_tokens` of them are the prompt. `block_table[i]` is the pool block that holds tokens
    [i * block_tokens, (i + 1) * block_tokens); it covers at least `start + count` tokens. KV of [0, start) is
    in the pool already. With `sampling` the logits of the row's last token give the token at output index
    `start + count - prompt_tokens`; without it (a prefill chunk that does not reach the end) none is sampled.
    """

    sequence: str
    token_ids: Sequence[int]
    prompt_tokens: int
    start: int
    count: int
    block_table: Sequence[int]
    sampling: SamplingParams | None
    kv_source: str = ""
    """Where KV of these tokens may be fetched, as an engine tells of itself (`EngineSpec.kv_source`)."""


class Fetched(NamedTuple):
    """KV that an engine fetched from another."""

    tokens: int = 0
    size_bytes: int = 0
    took_us: int = 0

    def plus(self, more: "Fetched") -> "Fetched":
        """Return both together."""
        return Fetched(self.tokens + more.tokens, self.size_bytes + more.size_bytes, self.took_us + more.took_us)


class SampledToken(NamedTuple):
    """One row's sampled token; `logprobs` if its parameters ask for them."""

    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """Outcome of a step: one entry per row, None where nothing was sampled.

    `failed` maps a row to the reason why it cannot go on (a grammar without a way on, logits not finite);
    the other rows are good. `step_us` is the time the step took inside the engine. Only engines with a pace of
    their own have the others: `pending` rows are not done, and will be asked for again; `ended` maps a row to why
    its sequence ends with this step, whether or not a token was sampled; `fetched` says of a row what was not computed.
    """

    sampled: tuple[SampledToken | None, ...]
    step_us: int
    failed: dict[int, str] = field(default_factory=dict)
    pending: frozenset[int] = frozenset()
    ended: dict[int, FinishReason] = field(default_factory=dict)
    fetched: dict[int, Fetched] = field(default_factory=dict)
