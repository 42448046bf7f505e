"""What a step's tokens are, read from the device in one copy: the one time in a step that the host waits for it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from mell_gpu_worker.engine.upload import upload
from mell_shared.messages.frontend import TokenLogprobs
from mell_shared.messages.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class Outcome:
    """Host values, each [rows]: the tokens, and flags that say what they mean.

    `finite`: the model's logits were; `possible`: something was left to choose from; `complete`: the draw is done.
    `logprobs` has the rows that ask for them and have finite logits.
    """

    tokens: NDArray[np.int64]
    finite: NDArray[np.bool_]
    possible: NDArray[np.bool_]
    complete: NDArray[np.bool_]
    logprobs: dict[int, TokenLogprobs]


def read_outcome(
    logits: torch.Tensor, tokens: torch.Tensor, flags: torch.Tensor, params: Sequence[SamplingParams]
) -> Outcome:
    """Wait for `tokens` [rows], `flags` [3, rows] in `Outcome`'s order, and the log-probabilities that are asked for.

    These are of the model's `logits` [rows, vocab] themselves, before penalties, bias and temperature.
    """
    asked = [index for index, sampling in enumerate(params) if sampling.logprobs is not None]
    parts = [tokens, flags]
    if asked:
        at = upload(np.array(asked), logits.device)
        logprobs = logits[at].log_softmax(-1)
        top = logprobs.topk(max(params[index].logprobs or 0 for index in asked))
        parts += [logprobs.gather(1, tokens[at][:, None])[:, 0], top.values, top.indices]
    ids, (finite, possible, complete), *asked_for = _read(parts)
    outcome = Outcome(ids.astype(np.int64), finite > 0, possible > 0, complete > 0, {})
    if asked:
        for index, logprob, values, top_ids in zip(asked, *(part.tolist() for part in asked_for), strict=True):
            if outcome.finite[index]:
                count = params[index].logprobs or 0
                outcome.logprobs[index] = TokenLogprobs(
                    logprob=logprob, top_ids=[int(i) for i in top_ids[:count]], top_logprobs=tuple(values[:count])
                )
    return outcome


def _read(parts: Sequence[torch.Tensor]) -> list[NDArray[np.float64]]:
    """Return the parts' values; float64 holds flags, ids and float32 exactly."""
    flat = torch.cat([part.double().flatten() for part in parts]).cpu().numpy()
    ends = np.cumsum([part.numel() for part in parts])
    pieces = np.split(flat, ends[:-1])
    return [piece.reshape(part.shape) for piece, part in zip(pieces, parts, strict=True)]
