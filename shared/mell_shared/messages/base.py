"""What all messages have in common, and the packed integer columns that carry token ids."""

import sys
from array import array
from collections.abc import Sized
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    StringConstraints,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

PROTOCOL_VERSION = 1
"""Raised when a message changes so that the previous release could not understand it."""


class Message(BaseModel):
    """A value that crosses a process boundary: frozen, validated once at the door.

    Unknown fields are ignored so that this release and the next can run side by side; NaN is refused.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


def pack_uint32(values: list[int]) -> bytes:
    """Return `values` (each in [0, 2**32)) as little-endian 32-bit words."""
    words = array("I", values)
    if sys.byteorder == "big":
        words.byteswap()
    return words.tobytes()


def unpack_uint32(data: bytes) -> list[int]:
    """Return the integers packed in `data`. Raises `ValueError` unless it holds whole words."""
    if len(data) % 4:
        raise ValueError(f"a packed column holds whole 4-byte words, got {len(data)} bytes")
    words = array("I", data)
    if sys.byteorder == "big":
        words.byteswap()
    return words.tolist()


def _read_column(data: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    # What is unpacked is in range by its size; only a plain list needs to be looked at item by item.
    return unpack_uint32(data) if isinstance(data, bytes) else validate(data)


Uint32 = Annotated[int, Field(ge=0, lt=2**32)]
Uint32Column = Annotated[
    list[Uint32],
    WrapValidator(_read_column),
    PlainSerializer(pack_uint32),
]
"""Integers in [0, 2**32), packed little-endian on the wire: token ids, indices, generations, counts."""

Id = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Label = Annotated[str, StringConstraints(max_length=200)]
"""A name that may be missing."""
Generation = Annotated[int, Field(ge=1, lt=2**32)]
"""Which submission or move of a sequence is meant; only its frontend raises it."""


def require_equal_lengths(**columns: Sized) -> None:
    """Raise `ValueError` unless all columns of one table have as many rows as the first."""
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"columns of unequal length: {lengths}")


MigrationMode = Literal["kv", "tokens", "hybrid"]
"""How a sequence's state gets to its target: copied, prefilled again from its ids, or part each."""
