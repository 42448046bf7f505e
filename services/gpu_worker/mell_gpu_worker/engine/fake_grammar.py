"""Grammars for the fake engine: llguidance over plain bytes, its state a replay of the output ids."""

from collections.abc import Sequence

from llguidance import LLMatcher, LLTokenizer

from mell_shared.models import FAKE_EOS_ID

_PRINTABLE = range(32, 127)
_LINE_BREAK = 10
"""Picked only where nothing else is allowed, as around the calls of functions."""
_CLOSING = frozenset(b'"]}')
_CLOSE_ONE_IN = 6
"""How often a string or list is closed where it could go on; else texts would seldom end."""


class ByteGrammars:
    """Checks grammars, and chooses tokens that they allow."""

    def __init__(self) -> None:
        self._tokenizer = LLTokenizer("byte")

    def fault(self, text: str) -> str | None:
        """Return why a grammar cannot be used, or None."""
        fault: str = LLMatcher.validate_grammar(text, self._tokenizer)
        return fault or None

    def choose(self, text: str, output_ids: Sequence[int], value: int) -> int | str:
        """Return the token that `value`, 64 random bits, picks of those allowed, or why there is none.

        The end is picked as soon as it is allowed.
        """
        matcher = LLMatcher(self._tokenizer, text, log_level=0)
        if not matcher.consume_tokens(list(output_ids)) or matcher.is_error():
            return "the output so far does not match the grammar"
        if matcher.is_accepting():
            return FAKE_EOS_ID
        mask = matcher.compute_bitmask()
        allowed = [token for token in _PRINTABLE if mask[token >> 3] & 1 << (token & 7)]
        if not allowed and mask[_LINE_BREAK >> 3] & 1 << (_LINE_BREAK & 7):
            allowed = [_LINE_BREAK]
        if not allowed:
            return "the grammar has no way on in printable characters"
        closing = [token for token in allowed if token in _CLOSING]
        if closing and (value >> 40) % _CLOSE_ONE_IN == 0:
            allowed = closing
        return allowed[value % len(allowed)]
