"""Masks of the tokens that a grammar allows next; a matcher's state is a replay of the output ids."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llguidance.hf
import llguidance.numpy
import numpy as np
from llguidance import LLMatcher, LLTokenizer
from numpy.typing import NDArray
from transformers import AutoTokenizer

from mell_gpu_worker.engine.base import EngineError


@dataclass(slots=True)
class _Replay:
    """A matcher, and the grammar and ids that brought it where it is."""

    text: str
    ids: list[int]
    matcher: LLMatcher


class GrammarMasks:
    """Answers which tokens may follow; replays are kept per sequence, used only if grammar and ids still agree."""

    def __init__(self, folder: Path, vocab_size: int, eos_token_ids: Sequence[int], most_replays: int) -> None:
        self._folder = folder
        self._vocab_size = vocab_size
        self._eos = list(eos_token_ids)
        self._most_replays = most_replays
        self._replays: OrderedDict[str, _Replay] = OrderedDict()
        self._tokenizer: LLTokenizer | None = None
        self._lock = threading.Lock()

    def check(self, text: str) -> str | None:
        """Return why a grammar cannot be used, or None; may be called while `mask` runs in another thread."""
        try:
            fault: str = LLMatcher.validate_grammar(text, self._llguidance())
        except EngineError as error:
            return str(error)
        return fault or None

    def mask(self, sequence: str, text: str, output_ids: Sequence[int], out: NDArray[np.int32]) -> str | None:
        """Set in `out` [ceil(vocab / 32)] the bits of the tokens allowed after `output_ids`; return why it cannot."""
        replay = self._replay(sequence, text, output_ids)
        if not replay.matcher.is_error():
            llguidance.numpy.fill_next_token_bitmask(replay.matcher, out[None])
        if replay.matcher.is_error():
            del self._replays[sequence]
            return f"the grammar has no way on: {replay.matcher.get_error().strip().splitlines()[0]}"
        return None if out.any() else "the grammar has no way on: it allows no token"

    def _replay(self, sequence: str, text: str, output_ids: Sequence[int]) -> _Replay:
        replay = self._replays.pop(sequence, None)
        if replay is None or replay.text != text or list(output_ids[: len(replay.ids)]) != replay.ids:
            replay = _Replay(text, [], LLMatcher(self._llguidance(), text, log_level=0))
        new = list(output_ids[len(replay.ids) :])
        replay.matcher.consume_tokens(new)
        replay.ids += new
        self._replays[sequence] = replay
        if len(self._replays) > self._most_replays:
            self._replays.popitem(last=False)
        return replay

    def _llguidance(self) -> LLTokenizer:
        """Return the tokenizer's tries, built at first use (about a second)."""
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = self._build()
            return self._tokenizer

    def _build(self) -> LLTokenizer:
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(self._folder, local_files_only=True, trust_remote_code=False)
            return llguidance.hf.from_tokenizer(tokenizer, n_vocab=self._vocab_size, eos_token=self._eos or None)
        except (ValueError, OSError) as error:
            first = str(error).strip().split("\n")[0]
            raise EngineError(f"the tokenizer in {self._folder} cannot be used for grammars: {first}") from error
