"""transformers' own `generate`, each prompt alone, and the rule by which our tokens are held against it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

TIE = 1e-4
"""At a first difference the reference's logits of the two tokens must be this close."""
RAREST_TIE = 2000


@dataclass
class Tally:
    """Tokens compared and first differences that were ties."""

    tokens: int = 0
    ties: int = 0

    def compare(self, ours: Sequence[int], tokens: Sequence[int], logits: torch.Tensor) -> None:
        """Hold our tokens against the reference's `tokens` and its `logits` [tokens, vocab]."""
        assert len(ours) == len(tokens)
        for index, (our, own) in enumerate(zip(ours, tokens, strict=True)):
            self.tokens += 1
            if our != own:
                gap = float(logits[index, own] - logits[index, our])
                assert 0 <= gap < TIE, f"token {index}: {our} instead of {own}, {gap} below it"
                self.ties += 1
                return

    def check(self, config: pytest.Config) -> None:
        """Print the counts, whatever pytest captures; ties must be rare."""
        capture: Any = config.pluginmanager.getplugin("capturemanager")
        with capture.global_and_fixture_disabled():
            config.get_terminal_writer().line(f"\n{self.tokens} tokens compared with generate, {self.ties} ties")
        assert self.ties * RAREST_TIE <= max(self.tokens, RAREST_TIE)


def generate(model: Any, prompt: Sequence[int], count: int) -> tuple[list[int], torch.Tensor]:
    """Return the reference's greedy tokens and the logits they were chosen from."""
    with torch.inference_mode():
        result = model.generate(
            torch.tensor([list(prompt)]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=0,
        )
    return result.sequences[0, len(prompt) :].tolist(), torch.cat(result.logits)
