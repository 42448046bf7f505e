"""Messages to bytes and back: msgpack on the wire, validated once by pydantic at the door."""

from typing import Literal, TypeVar

import msgpack
from pydantic import BaseModel, TypeAdapter, ValidationError

M = TypeVar("M")

_MAX_LIST_ITEMS = 2**16
_MAX_MAP_ITEMS = 2**18
"""Nothing of ours is longer (long columns are packed bytes); a forged length must not reserve memory."""
_SUMMARY_CHARS = 300


class InvalidMessageError(ValueError):
    """The bytes are no message of the expected union; says where and why, without the content."""


def encode(message: BaseModel) -> bytes:
    """Return `message` as msgpack."""
    packed: bytes = msgpack.packb(message.model_dump(), use_bin_type=True)
    return packed


def decode(adapter: TypeAdapter[M], data: bytes, *, unknown_fields: Literal["ignore", "forbid"] = "ignore") -> M:
    """Return the message in `data`.

    Raises `InvalidMessageError` for anything else, however malformed.
    """
    try:
        value = msgpack.unpackb(
            data, raw=False, strict_map_key=False, max_array_len=_MAX_LIST_ITEMS, max_map_len=_MAX_MAP_ITEMS
        )
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as error:
        raise InvalidMessageError(f"not msgpack: {type(error).__name__}") from None
    try:
        return adapter.validate_python(value, extra=unknown_fields)
    except ValidationError as error:
        raise InvalidMessageError(_summary(error)) from None  # the cause quotes the content


def _summary(error: ValidationError) -> str:
    faults = error.errors(include_url=False, include_context=False, include_input=False)
    first = faults[0]
    place = ".".join(str(part) for part in first["loc"]) or "message"
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    # Keys and tags of the content can stand in place and text; a short piece of them is enough.
    return f"{place[:_SUMMARY_CHARS]}: {first['msg'][:_SUMMARY_CHARS]}{more}"
