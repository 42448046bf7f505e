"""From logits to tokens, for all rows of a step at once; a row's result depends on its own logits and ids alone."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from mell_gpu_worker.core.step import SampledToken, StepRow
from mell_gpu_worker.engine.draw import DrawParams, draw
from mell_gpu_worker.engine.grammar import GrammarMasks
from mell_gpu_worker.engine.logit_edits import LogitEdits
from mell_gpu_worker.engine.philox import uniforms
from mell_shared.messages.frontend import TokenLogprobs
from mell_shared.messages.sampling import SamplingParams

Failures = dict[int, str]
DrawTokens = Callable[[torch.Tensor, DrawParams], torch.Tensor]
"""`draw`, or what draws the same tokens faster."""


class Sampler:
    """Chooses tokens by each row's parameters; holds nothing that a row's outcome depends on."""

    def __init__(
        self, vocab_size: int, eos_token_ids: Sequence[int], grammars: GrammarMasks, draw: DrawTokens = draw
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
        tokens = self._choose(edited, best.indices, rows, params)
        # A sum is finite only if all its terms are: one pass instead of two.
        states = torch.stack([logits.sum(-1).isfinite(), best.values > float("-inf")]).tolist()
        for index, (finite, possible) in enumerate(zip(*states, strict=True)):
            if not finite:
                failed[index] = "the model's logits are not finite"
            elif not possible:
                failed.setdefault(index, "the grammar and min_tokens together allow no token")
        return _results(logits, tokens, params, failed), failed

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
        forbidden = torch.from_numpy(~allowed).to(logits.device)
        at = torch.tensor(constrained, device=logits.device)
        logits[at] = logits[at].masked_fill_(forbidden, float("-inf"))
        return logits, failed

    def _choose(
        self, logits: torch.Tensor, best: torch.Tensor, rows: Sequence[StepRow], params: Sequence[SamplingParams]
    ) -> torch.Tensor:
        drawn = [index for index, sampling in enumerate(params) if sampling.temperature > 0]
        if not drawn:
            return best
        at = torch.tensor(drawn, device=logits.device)
        chosen = self._draw(
            logits[at], _draw_params([rows[i] for i in drawn], [params[i] for i in drawn], logits.device)
        )
        return best.index_copy(0, at, chosen)


def _params(row: StepRow) -> SamplingParams:
    assert row.sampling is not None, row.sequence
    return row.sampling


def _grammar_text(row: StepRow) -> str:
    assert row.sampling is not None
    assert row.sampling.grammar is not None, row.sequence
    return row.sampling.grammar.text


def _draw_params(rows: list[StepRow], params: list[SamplingParams], device: torch.device) -> DrawParams:
    outputs = [row.start + row.count - row.prompt_tokens for row in rows]
    uniform = uniforms([p.seed for p in params], [p.choice for p in params], outputs)
    return DrawParams(
        temperature=torch.tensor([p.temperature for p in params], dtype=torch.float64, device=device),
        top_k=torch.tensor([p.top_k for p in params], device=device),
        top_p=torch.tensor([p.top_p for p in params], dtype=torch.float64, device=device),
        min_p=torch.tensor([p.min_p for p in params], dtype=torch.float64, device=device),
        uniform=torch.from_numpy(uniform).to(device),
    )


def _results(
    logits: torch.Tensor, tokens: torch.Tensor, params: Sequence[SamplingParams], failed: Failures
) -> list[SampledToken]:
    results = [SampledToken(token) for token in tokens.tolist()]
    asked = [i for i, sampling in enumerate(params) if sampling.logprobs is not None and i not in failed]
    if not asked:
        return results
    at = torch.tensor(asked, device=logits.device)
    # Of the model itself, before penalties, bias and temperature.
    logprobs = logits[at].log_softmax(-1)
    chosen = logprobs.gather(1, tokens[at][:, None])[:, 0].tolist()
    most = max(params[i].logprobs or 0 for i in asked)
    top = logprobs.topk(most)
    for i, logprob, values, ids in zip(asked, chosen, top.values.tolist(), top.indices.tolist(), strict=True):
        count = params[i].logprobs or 0
        results[i] = SampledToken(
            results[i].token_id,
            TokenLogprobs(logprob=logprob, top_ids=ids[:count], top_logprobs=tuple(values[:count])),
        )
    return results
