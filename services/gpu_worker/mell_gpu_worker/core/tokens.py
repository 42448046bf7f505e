"""Token messages: what one step made, a message for each frontend, and what a frontend asks for again."""

from collections.abc import Iterator

from mell_gpu_worker.core.sequence import Sequence
from mell_shared.messages.frontend import TokenLogprobs, TokensGenerated
from mell_shared.messages.sampling import FinishReason

RESEND_TOKENS = 1024
"""Most tokens in one resent message, so that with all logprobs it stays far below any payload limit."""


class TokensTable:
    """Rows for one frontend, to be sent as one message."""

    __slots__ = ("_cached", "_counts", "_finished", "_first", "_generations", "_ids", "_logprobs", "_sequences")

    def __init__(self) -> None:
        self._sequences: list[str] = []
        self._generations: list[int] = []
        self._first: list[int] = []
        self._counts: list[int] = []
        self._ids: list[int] = []
        self._logprobs: dict[int, tuple[TokenLogprobs, ...]] = {}
        self._finished: dict[int, FinishReason] = {}
        self._cached: dict[int, int] = {}

    def add(self, sequence: Sequence, first_index: int, end_index: int) -> None:
        """Add output tokens [first_index, end_index); the last of an ended sequence bring its reason."""
        row = len(self._sequences)
        self._sequences.append(sequence.sequence)
        self._generations.append(sequence.generation)
        self._first.append(first_index)
        self._counts.append(end_index - first_index)
        start = sequence.prompt_tokens
        token_ids = sequence.token_ids
        if end_index - first_index == 1:
            self._ids.append(token_ids[start + first_index])  # the one token of a step; no list for it
        else:
            self._ids += token_ids[start + first_index : start + end_index]
        if sequence.logprobs:
            offset = sequence.submitted_outputs
            self._logprobs[row] = tuple(sequence.logprobs[first_index - offset : end_index - offset])
        if first_index == sequence.submitted_outputs:
            self._cached[row] = sequence.cached_tokens
        if sequence.finish_reason is not None and end_index == len(sequence.token_ids) - start:
            self._finished[row] = sequence.finish_reason

    def message(self, worker: str) -> TokensGenerated:
        """Return the rows as a message."""
        # Our own columns, one row each per `add`: validating them again would cost more than making them.
        return TokensGenerated.model_construct(
            worker=worker,
            sequences=tuple(self._sequences),
            generations=self._generations,
            first_indices=self._first,
            counts=self._counts,
            token_ids=self._ids,
            logprobs=self._logprobs,
            finished=self._finished,
            cached_tokens=self._cached,
        )


def tables_from(sequence: Sequence, first_index: int) -> Iterator[TokensTable]:
    """Yield all output from `first_index` on, in tables of bounded size, the end's reason with the last.

    What the frontend itself submitted is not sent back: it starts at the first token made here.
    """
    first = min(max(first_index, sequence.submitted_outputs), sequence.outputs)
    while True:
        end = min(first + RESEND_TOKENS, sequence.outputs)
        table = TokensTable()
        table.add(sequence, first, end)
        yield table
        first = end
        if first == sequence.outputs:
            return
