"""Drawing a token from logits, defined in integers so that a row's result depends on nothing but the row.

A token's weight is floor(2**40 * exp(logit / temperature - largest)), from float64. Sums of weights are exact, in
any order, on any device. With u the row's uniform number, the token drawn is the first whose cumulative weight is
above floor(u * total): in order of ids, or, where top_k, top_p or min_p cut the distribution, in order of falling
weight, then ids. The cuts follow each other as in transformers: top_k, top_p of what is left, min_p.
"""

from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray

from mell_gpu_worker.engine.upload import upload

_WEIGHT_ONE = float(1 << 40)
_ID_BITS = 22
_ID_MASK = (1 << _ID_BITS) - 1
_FIRST_CANDIDATES = 512
_CANDIDATE_GROWTH = 8
"""How many of the likeliest tokens are sorted at first; rows that they do not reach far enough for sort more."""


@dataclass(frozen=True, slots=True)
class DrawParams:
    """One value a row, each [rows]: `top_k` 0, `top_p` 1 and `min_p` 0 cut nothing; `uniform` in [0, 1), float64."""

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    uniform: torch.Tensor

    def rows(self, index: torch.Tensor) -> "DrawParams":
        """Return the parameters of some rows."""
        return DrawParams(*(getattr(self, field.name)[index] for field in fields(self)))

    def on(self, device: torch.device) -> "DrawParams":
        """Return the host's parameters on a device, in one copy; a `top_k` beyond 2**53 may be rounded."""
        packed = upload(torch.stack([getattr(self, field.name).double() for field in fields(self)]), device)
        temperature, top_k, top_p, min_p, uniform = packed
        return DrawParams(temperature, top_k.long(), top_p, min_p, uniform)


class Drawing:
    """A draw from float32 logits [rows, vocab] (vocab below 2**22) that waits for nothing until `finish`.

    `params` are the host's. `tokens` [rows] are drawn where `complete` [rows] says so; both are on the logits' device.
    """

    def __init__(self, logits: torch.Tensor, params: DrawParams) -> None:
        device = logits.device
        cut = ((params.top_k > 0) | (params.top_p < 1) | (params.min_p > 0)).numpy()
        self._top_k: NDArray[np.int64] = params.top_k.numpy()
        self._params = params.on(device)
        self._weights = _weights(logits, self._params.temperature)
        self.tokens = logits.new_empty(len(logits), dtype=torch.int64)
        self.complete = logits.new_ones(len(logits), dtype=torch.bool)
        if not cut.all():
            whole = upload((~cut).nonzero()[0], device)
            self.tokens[whole] = _invert(self._weights[whole], self._params.uniform[whole])
        if cut.any():
            self._draw_cut(cut.nonzero()[0], _FIRST_CANDIDATES)

    def finish(self, complete: NDArray[np.bool_]) -> torch.Tensor:
        """Return the tokens, those drawn that `complete` says are missing; `complete` is what ours holds."""
        short, candidates = (~complete).nonzero()[0], _FIRST_CANDIDATES
        while len(short):
            candidates *= _CANDIDATE_GROWTH
            self._draw_cut(short, candidates)
            short = (~self.complete.cpu().numpy()).nonzero()[0]
        return self.tokens

    def _draw_cut(self, rows: NDArray[np.int64], candidates: int) -> None:
        at = upload(rows, self.tokens.device)
        weights, params = self._weights[at], self._params.rows(at)
        vocab = weights.shape[-1]
        ids = torch.arange(vocab, device=weights.device)
        keys = (weights << _ID_BITS) | (_ID_MASK - ids)
        limit = torch.where(params.top_k > 0, params.top_k, vocab).clamp_(max=vocab)
        count = min(vocab, max(candidates, int(self._top_k[rows].max())))
        kept, complete = _kept(keys.topk(count).values, weights, limit, params)
        chosen = _invert(kept >> _ID_BITS, params.uniform)
        self.tokens[at] = _ID_MASK - (kept.gather(1, chosen[:, None])[:, 0] & _ID_MASK)
        self.complete[at] = complete if count < vocab else torch.ones_like(complete)


def _weights(logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    scaled = logits.double() / temperature[:, None]
    return (scaled.sub_(scaled.amax(-1, keepdim=True)).exp_().mul_(_WEIGHT_ONE)).to(torch.int64)


def _invert(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Return the first index whose cumulative weight is above floor(uniform * total), for each row."""
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1]
    # The product may round up to the total itself.
    target = torch.minimum((uniform * total.double()).to(torch.int64), total - 1)
    return torch.searchsorted(cumulative, target[:, None], right=True)[:, 0].clamp_(max=weights.shape[-1] - 1)


def _kept(
    keys: torch.Tensor, weights: torch.Tensor, limit: torch.Tensor, params: DrawParams
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the keys, 0 for the weights of tokens cut off, and for each row whether no further token is kept."""
    ranked = keys >> _ID_BITS
    rank = torch.arange(keys.shape[-1], device=keys.device)
    ranked = torch.where(rank < limit[:, None], ranked, 0)
    cumulative = ranked.cumsum(-1)
    total = torch.where(params.top_k > 0, cumulative[:, -1], weights.sum(-1)).double()
    below = cumulative - ranked < (params.top_p * total)[:, None]
    least = params.min_p * ranked[:, 0].double()
    kept = below & (ranked >= least[:, None])
    last = ranked[:, -1]
    done = (cumulative[:, -1] >= params.top_p * total) | (last < least) | (last == 0)
    return torch.where(kept & (ranked > 0), keys, keys & _ID_MASK), done
