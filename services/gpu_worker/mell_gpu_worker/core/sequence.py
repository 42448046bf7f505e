"""One sequence at a worker: its tokens, its blocks, how far its KV is computed, and what ends it."""

from collections.abc import Sequence as Values
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

from mell_gpu_worker.core.blocks import chain_digest
from mell_gpu_worker.core.step import Fetched, SampledToken
from mell_shared.messages.frontend import TokenLogprobs
from mell_shared.messages.sampling import FinishReason, SamplingParams
from mell_shared.messages.worker import ReserveKv, Submit


class Phase(IntEnum):
    """Where a sequence stands; the first two are also its state in a report."""

    RUNNING = 0
    """Holds blocks for all its tokens and the next."""
    WAITING = 1
    """Preempted: holds nothing, comes back before anything new."""
    ENDED = 2
    """Holds nothing; its output is kept until its frontend acknowledges the end."""
    ARRIVING = 3
    """Another worker's, about to move here: holds blocks, which are filled from there or by prefill."""


class Order(NamedTuple):
    """What comes first: the higher priority, then who has been served for longer, wherever that was."""

    negated_priority: int
    since_us: int
    """When it began, by this worker's clock; before it came here, if it was moved."""
    number: int


@dataclass(frozen=True, slots=True)
class Limits:
    """What ends any sequence here: the longest that fits, in tokens, and the model's end tokens."""

    max_total_tokens: int
    eos_token_ids: frozenset[int]


@dataclass(slots=True, eq=False)
class Sequence:
    """A submission accepted here. KV of tokens [0, `computed`) lies in `blocks`."""

    sequence: str
    generation: int
    frontend: str
    sampling: SamplingParams
    order: "Order"
    token_ids: list[int]
    """Prompt, then output."""
    prompt_tokens: int
    submitted_outputs: int
    """Output tokens that the frontend had already when the sequence came here."""
    max_outputs: int
    stop_ids: frozenset[int]
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    cached_tokens: int = 0
    """Prompt tokens found in the prefix cache when it first started."""
    phase: Phase = Phase.RUNNING
    started: bool = False
    in_step: bool = False
    """Part of the step that the engine is computing now, which may be writing to its blocks."""
    halted: bool = False
    """Stands still, so that it can be moved elsewhere."""
    unclaimed: bool = False
    """Came from elsewhere, perhaps is computed already, but its frontend has not granted it to this worker yet."""
    prefill_limit: int = 0
    """While it is arriving: how many tokens' KV is to be computed here."""
    kv_source: str = ""
    """Where the engine may fetch KV that it would have to compute."""
    fetched: Fetched = field(default_factory=Fetched)
    """What it has fetched."""
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Of the outputs from `submitted_outputs` on, if asked for."""
    _digests: list[bytes] = field(default_factory=list)

    @property
    def outputs(self) -> int:
        """Output tokens so far; the index of the next."""
        return len(self.token_ids) - self.prompt_tokens

    @property
    def live(self) -> bool:
        """Whether it has not ended."""
        return self.phase is not Phase.ENDED

    def output_ids(self, first_index: int = 0) -> list[int]:
        """Return the output from `first_index` on."""
        return self.token_ids[self.prompt_tokens + first_index :]

    def append(self, sampled: SampledToken) -> FinishReason | None:
        """Add a token; returns why the sequence ends with it, or None."""
        self.token_ids.append(sampled.token_id)
        if sampled.logprobs is not None:
            self.logprobs.append(sampled.logprobs)
        return self.end_reason()

    def end_reason(self) -> FinishReason | None:
        """Return why nothing may follow the last token, or None."""
        outputs = len(self.token_ids) - self.prompt_tokens
        if self.token_ids[-1] in self.stop_ids and outputs > self.sampling.min_tokens:
            return "stop"
        return "length" if outputs >= self.max_outputs else None

    def digests(self, root: bytes, blocks: int, block_tokens: int) -> Values[bytes]:
        """Return the chained digests of its first `blocks` blocks, which its tokens must fill."""
        known = self._digests
        for index in range(len(known), blocks):
            tokens = self.token_ids[index * block_tokens : (index + 1) * block_tokens]
            assert len(tokens) == block_tokens, "only full blocks have a digest"
            known.append(chain_digest(known[-1] if known else root, tokens))
        return known[:blocks]


def accept(submit: Submit, order: Order, limits: Limits) -> Sequence:
    """Return the sequence that `submit` asks for; it holds nothing yet."""
    sampling = submit.sampling
    room = limits.max_total_tokens - len(submit.prompt_ids)
    return Sequence(
        sequence=submit.sequence,
        generation=submit.generation,
        frontend=submit.frontend,
        sampling=sampling,
        order=order,
        token_ids=[*submit.prompt_ids, *submit.output_ids],
        prompt_tokens=len(submit.prompt_ids),
        submitted_outputs=len(submit.output_ids),
        max_outputs=room if sampling.max_tokens is None else min(sampling.max_tokens, room),
        stop_ids=_stop_ids(sampling, limits),
    )


def arriving(asked: ReserveKv, order: Order, limits: Limits) -> Sequence:
    """Return the sequence that a migration brings here, in the generation that it leaves; it holds nothing yet."""
    return Sequence(
        sequence=asked.sequence,
        generation=asked.generation,
        frontend=asked.frontend,
        sampling=asked.sampling,
        order=order,
        token_ids=[*asked.prompt_ids, *asked.output_ids],
        prompt_tokens=len(asked.prompt_ids),
        submitted_outputs=len(asked.output_ids),
        max_outputs=asked.max_outputs,
        stop_ids=_stop_ids(asked.sampling, limits),
        unclaimed=True,
        kv_source=asked.kv_source,
    )


def _stop_ids(sampling: SamplingParams, limits: Limits) -> frozenset[int]:
    eos = frozenset() if sampling.ignore_eos else limits.eos_token_ids
    return eos | frozenset(sampling.stop_token_ids)
