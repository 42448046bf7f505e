"""How a vocabulary spells bytes in its tokens, read off its decoder; pure."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_SPACE_MARK = "\u2581"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True)
class TokenForm:
    """`to_bytes` turns a token's spelling into its bytes.

    `bytewise`: a text is its tokens' bytes in a row. `strips_space`: but for one space at its very start.
    """

    to_bytes: Callable[[str], bytes]
    bytewise: bool
    strips_space: bool = False


def token_form(decoder: dict[str, Any]) -> TokenForm:
    """Return the form that a `tokenizer.json` decoder (its JSON, empty for none) stands for."""
    steps = decoder["decoders"] if decoder.get("type") == "Sequence" else [decoder]
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return TokenForm(_byte_level, bytewise=True)
    if kinds == ["Metaspace"]:
        # "split" is an older release's name for what is now a scheme.
        strips = steps[0].get("prepend_scheme", "always") != "never"
        return TokenForm(_space_mark, bytewise=True, strips_space=strips)
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and _replaces_space_mark(steps[0]):
        if kinds[3:] == []:
            return TokenForm(_byte_fallback, bytewise=True)
        if kinds[3:] == ["Strip"] and (steps[3]["content"], steps[3]["start"], steps[3]["stop"]) == (" ", 1, 0):
            return TokenForm(_byte_fallback, bytewise=True, strips_space=True)
    return TokenForm(_space_mark, bytewise=False)


def _replaces_space_mark(step: dict[str, Any]) -> bool:
    return bool(step["pattern"] == {"String": _SPACE_MARK} and step["content"] == " ")


def _space_mark(token: str) -> bytes:
    return token.replace(_SPACE_MARK, " ").encode()


def _byte_fallback(token: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(token)
    return bytes((int(byte[1], 16),)) if byte else _space_mark(token)


def _byte_characters() -> dict[str, int]:
    """Return GPT-2's reversible map: bytes that print stand for themselves, the others for U+0100 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTES_OF = _byte_characters()


def _byte_level(token: str) -> bytes:
    try:
        return bytes([_BYTES_OF[character] for character in token])
    except KeyError:
        # Added tokens are plain text; the decoder takes them as they are.
        return token.encode()
