"""Token ids to text, bit by bit, without ever showing half a character; pure, one object per stream."""

import codecs
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

_MAX_HELD_TOKENS = 16
"""No character takes more tokens; a text that really ends in U+FFFD must not grow the window for ever."""


class Detokenizer(Protocol):
    """The text of one stream. The pieces of all `push` calls and the `flush` make up the whole text."""

    def push(self, token_ids: Sequence[int]) -> str:
        """Return the text that is certain now that these tokens came too."""
        ...

    def flush(self) -> str:
        """Return what was held back; nothing follows."""
        ...


class ByteDetokenizer:
    """For vocabularies whose tokens are bytes (byte-level BPE, SentencePiece with byte fallback).

    `token_bytes` maps an id to its bytes, empty for tokens that are not shown. Bytes that can still become a
    character are held; those that cannot become U+FFFD. `strip_space` drops one space at the very start.
    """

    def __init__(self, token_bytes: Mapping[int, bytes], *, strip_space: bool = False) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip_space = strip_space

    def push(self, token_ids: Sequence[int]) -> str:
        """Return the characters that are complete now."""
        data = b"".join(map(self._token_bytes.__getitem__, token_ids))
        if self._strip_space and data:
            self._strip_space = False
            data = data.removeprefix(b" ")
        return self._decoder.decode(data)

    def flush(self) -> str:
        """Return U+FFFD if a character stayed incomplete."""
        return self._decoder.decode(b"", True)


class WindowDetokenizer:
    """For any other vocabulary: decodes a short window again and again and shows what it grew by.

    A token's text may depend on the token before it, so the window starts at tokens already shown.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], context_ids: Sequence[int]) -> None:
        self._decode = decode
        self._window = list(context_ids)
        self._shown_ids = len(self._window)

    def push(self, token_ids: Sequence[int]) -> str:
        """Return the new text unless it ends in the middle of a character."""
        self._window.extend(token_ids)
        text = self._decode(self._window)
        if text.endswith("\ufffd") and len(self._window) - self._shown_ids < _MAX_HELD_TOKENS:
            return ""
        return self._take(text)

    def flush(self) -> str:
        """Return what was held back, as it is."""
        return self._take(self._decode(self._window))

    def _take(self, text: str) -> str:
        shown = self._decode(self._window[: self._shown_ids])
        self._window = self._window[self._shown_ids :] or self._window
        self._shown_ids = len(self._window)
        return text[len(shown) :]
