"""From logits to tokens, for all rows of a step at once; a row's result depends on its own logits and ids alone."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from mell_gpu_worker.core.step import SampledToken, StepRow
from mell_gpu_worker.engine.draw import Drawing, DrawParams
from mell_gpu_worker.engine.grammar import GrammarMasks
from mell_gpu_worker.engine.logit_edits import LogitEdits
from mell_gpu_worker.engine.outcome import Outcome, read_outcome
from mell_gpu_worker.engine.philox import uniforms
from mell_gpu_worker.engine.upload import upload
from mell_shared.messages.sampling import SamplingParams

Failures = dict[int, str]
DrawTokens = Callable[[torch.Tensor, DrawParams], torch.Tensor]
"""What draws the same tokens as `Drawing`, faster, where the logits are."""


class _Choice:
    """The tokens `best` [rows] of the largest logits, with those of a drawing in the place of the rows `drawn`."""

    def __init__(self, best: torch.Tensor, drawn: list[int], drawing: Drawing) -> None:
        self._best = best
        self._drawn = np.array(drawn)
        self._at = upload(self._drawn, best.device)
        self._drawing = drawing

    def state(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tokens so far, and for which rows they are final."""
        complete = torch.ones_like(self._best, dtype=torch.bool)
        return (
            self._best.index_copy(0, self._at, self._drawing.tokens),
            complete.index_copy_(0, self._at, self._drawing.complete),
        )

    def finish(self, complete: NDArray[np.bool_]) -> None:
        """Make all tokens final; `complete` says which are."""
        self._drawing.finish(complete[self._drawn])


class Sampler:
    """Chooses tokens by each row's parameters, where the logits are; holds nothing that a row's outcome depends on.

    The host waits for the device once a step, for all it needs to know of it; a second time if a row's `top_p` or
    `min_p` reach further than the candidates that were sorted.
    """

    def __init__(
        self,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        grammars: GrammarMasks,
        draw: DrawTokens | None = None,
    ) -> None:
        self._draw = draw
        self._vocab_size = vocab_size
        self._eos = eos_token_ids
        self._grammars = grammars

    def check_grammar(self, text: str) -> str | None:
        """Return why a grammar cannot be used, or None."""
        return self._grammars.check(text)

    def sample(self, logits: torch.Tensor, rows: Sequence[StepRow]) -> tuple[list[SampledToken], Failures]:
        """Return a token for each row (all have `sampling`) from float32 logits [rows, vocab], and failed rows.

        A failed row (logits not finite, a grammar without a way on) has a token too, which means nothing.
        """
        params = [_params(row) for row in rows]
        edited, failed = self._edited(logits, rows, params)
        best = edited.max(-1)
        # A sum is finite only if all its terms are: one pass instead of two.
        flags = [logits.sum(-1).isfinite(), best.values > float("-inf")]
        choice = self._choose(edited, best.indices, rows, params)
        outcome = _read(logits, flags, choice, params)
        if isinstance(choice, _Choice) and not outcome.complete.all():
            choice.finish(outcome.complete)
            outcome = _read(logits, flags, choice, params)
        for index, (finite, possible) in enumerate(zip(outcome.finite, outcome.possible, strict=True)):
            if not finite:
                failed[index] = "the model's logits are not finite"
            elif not possible:
                failed.setdefault(index, "the grammar and min_tokens together allow no token")
        return [
            SampledToken(token, None if index in failed else outcome.logprobs.get(index))
            for index, token in enumerate(outcome.tokens.tolist())
        ], failed

    def _edited(
        self, logits: torch.Tensor, rows: Sequence[StepRow], params: Sequence[SamplingParams]
    ) -> tuple[torch.Tensor, Failures]:
        edits = LogitEdits(self._vocab_size, self._eos)
        for index, (row, sampling) in enumerate(zip(rows, params, strict=True)):
            edits.add(index, row, sampling)
        edited = edits.apply(logits)
        constrained = [index for index, sampling in enumerate(params) if sampling.grammar is not None]
        if not constrained:
            return edited, {}
        return self._masked(edited.clone() if edited is logits else edited, rows, constrained)

    def _masked(
        self, logits: torch.Tensor, rows: Sequence[StepRow], constrained: list[int]
    ) -> tuple[torch.Tensor, Failures]:
        """Set to -inf, in place, what the rows' grammars forbid."""
        bits = np.zeros((len(constrained), -(-self._vocab_size // 32)), dtype=np.int32)
        failed: Failures = {}
        for out, index in zip(bits, constrained, strict=True):
            row = rows[index]
            text = _grammar_text(row)
            fault = self._grammars.mask(
                row.sequence, text, row.token_ids[row.prompt_tokens : row.start + row.count], out
            )
            if fault:
                failed[index] = fault
        allowed = np.unpackbits(bits.view(np.uint8), axis=1, bitorder="little")[:, : self._vocab_size].astype(bool)
        forbidden = upload(~allowed, logits.device)
        at = upload(np.array(constrained), logits.device)
        logits[at] = logits[at].masked_fill_(forbidden, float("-inf"))
        return logits, failed

    def _choose(
        self, logits: torch.Tensor, best: torch.Tensor, rows: Sequence[StepRow], params: Sequence[SamplingParams]
    ) -> torch.Tensor | _Choice:
        """Return the tokens, or those that a drawing may still have to finish."""
        drawn = [index for index, sampling in enumerate(params) if sampling.temperature > 0]
        if not drawn:
            return best
        at = upload(np.array(drawn), logits.device)
        draw_params = _draw_params([rows[i] for i in drawn], [params[i] for i in drawn])
        if self._draw is not None:
            return best.index_copy(0, at, self._draw(logits[at], draw_params))
        return _Choice(best, drawn, Drawing(logits[at], draw_params))


def _read(
    logits: torch.Tensor, flags: list[torch.Tensor], choice: torch.Tensor | _Choice, params: Sequence[SamplingParams]
) -> Outcome:
    tokens, complete = choice.state() if isinstance(choice, _Choice) else (choice, torch.ones_like(flags[0]))
    return read_outcome(logits, tokens, torch.stack([*flags, complete]), params)


def _params(row: StepRow) -> SamplingParams:
    assert row.sampling is not None, row.sequence
    return row.sampling


def _grammar_text(row: StepRow) -> str:
    assert row.sampling is not None
    assert row.sampling.grammar is not None, row.sequence
    return row.sampling.grammar.text


def _draw_params(rows: list[StepRow], params: list[SamplingParams]) -> DrawParams:
    outputs = [row.start + row.count - row.prompt_tokens for row in rows]
    return DrawParams(
        temperature=torch.tensor([p.temperature for p in params], dtype=torch.float64),
        top_k=torch.tensor([p.top_k for p in params]),
        top_p=torch.tensor([p.top_p for p in params], dtype=torch.float64),
        min_p=torch.tensor([p.min_p for p in params], dtype=torch.float64),
        uniform=torch.from_numpy(uniforms([p.seed for p in params], [p.choice for p in params], outputs)),
    )
