"""Text to token ids and back, from a model folder's `tokenizer.json`, without torch or transformers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from tokenizers import Tokenizer as RustTokenizer

from mell_frontend.detokenizer import ByteDetokenizer, Detokenizer, WindowDetokenizer
from mell_frontend.token_form import token_form
from mell_shared.models import FAKE_BOS_ID, FAKE_EOS_ID, FAKE_VOCAB_SIZE

TOOL_MARKS = ("<tool_call>", "</tool_call>")
"""Tokens that are shown even where the vocabulary calls them special: calls are found by them."""

_CONTEXT_TOKENS = 6


class TokenizerError(Exception):
    """The folder's tokenizer cannot be used; the message says what to do."""


class Tokenizer(Protocol):
    """A model's vocabulary."""

    @property
    def vocab_size(self) -> int:
        """Ids are in [0, vocab_size)."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the ids of `text`; special tokens spelled in it are read as such where the vocabulary does so."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of `token_ids`, special tokens left out."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token, special ones too."""
        ...

    def is_special(self, text: str) -> bool:
        """Whether `text` is one special token."""
        ...

    def detokenizer(self, prompt_ids: Sequence[int]) -> Detokenizer:
        """Return a fresh detokenizer of an output that follows `prompt_ids`."""
        ...


class ByteTokenizer:
    """The `fake` model's vocabulary: bytes, one token that begins and one that ends a sequence."""

    def __init__(self) -> None:
        self._shown = {token: bytes((token,)) for token in range(256)} | {FAKE_BOS_ID: b"", FAKE_EOS_ID: b""}

    @property
    def vocab_size(self) -> int:
        """Ids are in [0, vocab_size)."""
        return FAKE_VOCAB_SIZE

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the UTF-8 bytes of `text`, after the begin token if it is asked for."""
        return [FAKE_BOS_ID] * add_special_tokens + list(text.encode())

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of `token_ids`, special tokens left out."""
        return b"".join(map(self._shown.__getitem__, token_ids)).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token, special ones too."""
        return {FAKE_BOS_ID: b"<bos>", FAKE_EOS_ID: b"<eos>"}.get(token_id) or self._shown[token_id]

    def is_special(self, text: str) -> bool:
        """Whether `text` is one special token."""
        return text in {"<bos>", "<eos>"}

    def detokenizer(self, prompt_ids: Sequence[int]) -> Detokenizer:
        """Return a fresh detokenizer."""
        return ByteDetokenizer(self._shown)


class _ByteTable(dict[int, bytes]):
    """Bytes shown for each id, worked out when first asked for: start-up need not read the whole vocabulary."""

    def __init__(self, tokenizer: "FolderTokenizer") -> None:
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, token_id: int) -> bytes:
        data = b"" if self._tokenizer.hidden(token_id) else self._tokenizer.token_bytes(token_id)
        self[token_id] = data
        return data


class FolderTokenizer:
    """The vocabulary in a model folder's `tokenizer.json`. Raises `TokenizerError` if there is none."""

    def __init__(self, folder: Path) -> None:
        self._rust = _load(folder / "tokenizer.json")
        added = self._rust.get_added_tokens_decoder()
        self._special = {token: item.content for token, item in added.items() if item.special}
        self._hidden = {token for token, content in self._special.items() if content not in TOOL_MARKS}
        self._vocab_size = max([self._rust.get_vocab_size(with_added_tokens=True), *(token + 1 for token in added)])
        decoder = self._rust.decoder
        self._form = token_form(json.loads(decoder.__getstate__()) if decoder is not None else {})
        self._shown = _ByteTable(self)

    @property
    def vocab_size(self) -> int:
        """Ids are in [0, vocab_size)."""
        return self._vocab_size

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the ids of `text`; special tokens spelled in it are read as such."""
        ids: list[int] = self._rust.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of `token_ids`, special tokens left out."""
        shown = [token for token in token_ids if token not in self._hidden]
        text: str = self._rust.decode(shown, skip_special_tokens=False)
        return text

    def hidden(self, token_id: int) -> bool:
        """Whether the token is left out of texts."""
        return token_id in self._hidden

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token, special ones too; empty for an id without a token."""
        text = self._rust.id_to_token(token_id)
        if text is None:
            return b""
        if token_id in self._special:
            return str(text).encode()
        return self._form.to_bytes(str(text))

    def is_special(self, text: str) -> bool:
        """Whether `text` is one special token."""
        return text in self._special.values()

    def detokenizer(self, prompt_ids: Sequence[int]) -> Detokenizer:
        """Return a fresh detokenizer of an output that follows `prompt_ids`."""
        if not self._form.bytewise:
            return WindowDetokenizer(self.decode, prompt_ids[-_CONTEXT_TOKENS:])
        begins = self._form.strips_space and not any(map(self._shown.__getitem__, prompt_ids))
        return ByteDetokenizer(self._shown, strip_space=begins)


def _load(path: Path) -> RustTokenizer:
    if not path.is_file():
        raise TokenizerError(
            f"{path.parent} has no tokenizer.json; save it once with transformers:"
            " AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    try:
        tokenizer = RustTokenizer.from_buffer(path.read_bytes())
    except ValueError as error:
        raise TokenizerError(f"{path} is damaged: {error}; pull the model again") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
