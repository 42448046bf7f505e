"""What a request's parameters do to its logits before a token is chosen; everything is recomputed from the ids."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from mell_gpu_worker.core.step import StepRow
from mell_gpu_worker.engine.upload import upload
from mell_shared.messages.sampling import SamplingParams


@dataclass(slots=True)
class Entries:
    """A sparse matrix: values at (row, token), no position twice."""

    rows: list[NDArray[np.int64]] = field(default_factory=list)
    tokens: list[NDArray[np.int64]] = field(default_factory=list)
    values: list[NDArray[np.float32]] = field(default_factory=list)

    def add(self, row: int, tokens: NDArray[np.int64], values: NDArray[np.float32] | float) -> None:
        """Note a value for each of a row's tokens."""
        if len(tokens):
            self.rows.append(np.full(len(tokens), row, dtype=np.int64))
            self.tokens.append(tokens)
            self.values.append(np.broadcast_to(np.asarray(values, dtype=np.float32), tokens.shape))

    def on(self, device: torch.device) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
        """Return the index pair and the values as tensors."""
        rows, tokens, values = (upload(np.concatenate(p), device) for p in (self.rows, self.tokens, self.values))
        return (rows, tokens), values


class LogitEdits:
    """Collects, row by row, then applies all at once, in this order.

    Repetition penalty over prompt and output (positive logits divided, negative multiplied; N. Keskar et al.,
    "CTRL", 2019), presence and frequency penalty over the output, `logit_bias`, end tokens banned by `min_tokens`.
    """

    def __init__(self, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._vocab_size = vocab_size
        self._eos = eos_token_ids
        self._repetition = Entries()
        self._penalties = Entries()
        self._biases = Entries()
        self._bans = Entries()

    def add(self, index: int, row: StepRow, sampling: SamplingParams) -> None:
        """Collect what the row at `index` of the logits asks for."""
        if sampling.repetition_penalty != 1:
            seen = np.unique(np.array(row.token_ids[: row.start + row.count], dtype=np.int64))
            self._repetition.add(index, self._known(seen), sampling.repetition_penalty)
        if sampling.presence_penalty or sampling.frequency_penalty:
            self._add_penalties(index, row, sampling)
        if sampling.logit_bias:
            tokens = np.array(list(sampling.logit_bias), dtype=np.int64)
            values = np.array(list(sampling.logit_bias.values()), dtype=np.float32)
            self._biases.add(index, tokens[tokens < self._vocab_size], values[tokens < self._vocab_size])
        if row.start + row.count - row.prompt_tokens < sampling.min_tokens:
            ends = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else self._eos)}
            self._bans.add(index, self._known(np.array(sorted(ends), dtype=np.int64)), float("-inf"))

    def _add_penalties(self, index: int, row: StepRow, sampling: SamplingParams) -> None:
        output = np.array(row.token_ids[row.prompt_tokens : row.start + row.count], dtype=np.int64)
        tokens, counts = np.unique(output, return_counts=True)
        amounts = sampling.presence_penalty + sampling.frequency_penalty * counts.astype(np.float32)
        self._penalties.add(index, tokens, -amounts)

    def _known(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        return tokens[tokens < self._vocab_size]

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Return edited logits [rows, vocab]; the argument itself if there is nothing to edit, else a copy."""
        edited = logits
        if self._repetition.rows:
            index, penalty = self._repetition.on(logits.device)
            edited = edited.clone()
            old = edited[index]
            edited[index] = torch.where(old > 0, old / penalty, old * penalty)
        for entries in (self._penalties, self._biases, self._bans):
            if entries.rows:
                index, values = entries.on(logits.device)
                edited = edited.clone() if edited is logits else edited
                edited[index] = edited[index] + values
        return edited
