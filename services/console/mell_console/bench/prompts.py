"""Prompts of a wanted length without the server's tokenizer: words, counted by what two warm-up requests say."""

import random
from dataclasses import dataclass

_TEXT = (
    "time year work part form line name side hand door book park city road tree rain snow wind fire rock sand gold "
    "milk fish bird song play game team ball wood iron boat ship farm hill lake moon star king army land home wall"
)
_WORDS = tuple(_TEXT.split())
"""All of four letters and common: one token each in most vocabularies, five bytes each in all."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """A prompt of w words has `fixed + per_word * w` tokens on this server."""

    fixed: float = 0.0
    per_word: float = 1.0

    def words_for(self, tokens: int) -> int:
        """Return how many words make a prompt of about `tokens` tokens, at least one."""
        return max(1, round((tokens - self.fixed) / self.per_word))


def calibrate(first: tuple[int, int], second: tuple[int, int]) -> Calibration:
    """Return what two (words, tokens) measurements say; one word a token if they say nothing sensible."""
    (words, tokens), (other_words, other_tokens) = first, second
    if words == other_words or (other_tokens - tokens) / (other_words - words) <= 0:
        return Calibration()
    per_word = (other_tokens - tokens) / (other_words - words)
    return Calibration(tokens - per_word * words, per_word)


def make_prompt(seed: int, words: int) -> str:
    """Return `words` words; equal seeds give equal prompts, others differ from the first words on."""
    source = random.Random(seed)  # noqa: S311 - not for secrets
    return " ".join(source.choices(_WORDS, k=words))
