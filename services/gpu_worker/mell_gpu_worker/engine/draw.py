"""Drawing a token from logits, defined in integers so that a row's result depends on nothing but the row.

A token's weight is floor(2**40 * exp(logit / temperature - largest)), from float64. Sums of weights are exact, in
any order, on any device. With u the row's uniform number, the token drawn is the first whose cumulative weight is
above floor(u * total): in order of ids, or, where top_k, top_p or min_p cut the distribution, in order of falling
weight, then ids. The cuts follow each other as in transformers: top_k, top_p of what is left, min_p.
"""

from dataclasses import dataclass

import torch

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
        return DrawParams(*(getattr(self, name)[index] for name in self.__dataclass_fields__))


def draw(logits: torch.Tensor, params: DrawParams) -> torch.Tensor:
    """Return one token id a row from float32 logits [rows, vocab] (vocab below 2**22)."""
    weights = _weights(logits, params.temperature)
    cut = (params.top_k > 0) | (params.top_p < 1) | (params.min_p > 0)
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    whole = (~cut).nonzero()[:, 0]
    if len(whole):
        tokens[whole] = _invert(weights[whole], params.uniform[whole])
    partial = cut.nonzero()[:, 0]
    if len(partial):
        tokens[partial] = _draw_cut(weights[partial], params.rows(partial))
    return tokens


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


def _draw_cut(weights: torch.Tensor, params: DrawParams, candidates: int = _FIRST_CANDIDATES) -> torch.Tensor:
    vocab = weights.shape[-1]
    ids = torch.arange(vocab, device=weights.device)
    keys = (weights << _ID_BITS) | (_ID_MASK - ids)
    limit = torch.where(params.top_k > 0, params.top_k, vocab).clamp_(max=vocab)
    count = min(vocab, max(candidates, int(params.top_k.max())))
    kept, complete = _kept(keys.topk(count).values, weights, limit, params)
    chosen = _invert(kept >> _ID_BITS, params.uniform)
    tokens = _ID_MASK - (kept.gather(1, chosen[:, None])[:, 0] & _ID_MASK)
    short = (~complete).nonzero()[:, 0]
    if count < vocab and len(short):
        tokens[short] = _draw_cut(weights[short], params.rows(short), candidates * _CANDIDATE_GROWTH)
    return tokens


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
