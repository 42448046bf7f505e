"""Strategies for messages as a hostile or broken peer sends them."""

from typing import Any, get_args

import msgpack
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter

from mell_shared.codec import encode
from mell_shared.messages.base import Message
from tests.shared.messages import messages_of

NAMES = ("a", "b", "c", "d")
"""Few, so that messages are about the same things."""
_NAMED = {"sequence", "worker", "frontend", "source", "target", "migration", "model"}

junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=8) | st.integers(0, 9), inner, max_size=6)
    ),
    max_leaves=20,
)


def union_of(adapter: TypeAdapter[Any]) -> list[type[Message]]:
    """Return the messages that an adapter takes."""
    found: list[type[Message]] = []

    def look(annotation: Any) -> None:
        if isinstance(annotation, type) and issubclass(annotation, Message):
            found.append(annotation)
        for argument in get_args(annotation):
            look(argument)

    look(adapter._type)
    return found


@st.composite
def about_the_same(draw: st.DrawFn, message: BaseModel) -> BaseModel:
    """Return the message with names of a small world in it, and small numbers, so that it meets state."""
    changes: dict[str, Any] = {}
    for name, value in message:
        if name in _NAMED and isinstance(value, str):
            changes[name] = draw(st.sampled_from(NAMES))
        elif name == "sequences":
            changes[name] = tuple(draw(st.sampled_from(NAMES)) for _ in value)
        elif name in {"generation", "term", "number", "length"} and isinstance(value, int):
            changes[name] = draw(st.integers(1, 4))
        elif name == "generations":
            changes[name] = [draw(st.integers(1, 4)) for _ in value]
        elif name in {"first_indices", "next_indices"}:
            changes[name] = [draw(st.integers(0, 6)) for _ in value]
        elif isinstance(value, BaseModel):
            changes[name] = draw(about_the_same(value))
    return message.model_copy(update=changes)


def valid(adapter: TypeAdapter[Any]) -> st.SearchStrategy[BaseModel]:
    """Return messages that a receiver takes, about few things."""
    return st.sampled_from(union_of(adapter)).flatmap(messages_of).flatmap(about_the_same)


@st.composite
def damaged(draw: st.DrawFn, adapter: TypeAdapter[Any]) -> bytes:
    """Return a valid message in bytes, then cut, doubled, with bytes changed, or with a field that is junk."""
    message = draw(st.sampled_from(union_of(adapter)).flatmap(messages_of))
    match draw(st.integers(0, 3)):
        case 0:
            fields = message.model_dump()
            fields[draw(st.sampled_from([*fields, "kind"]))] = draw(junk)
            packed: bytes = msgpack.packb(fields)
            return packed
        case 1:
            whole = encode(message)
            return whole[: draw(st.integers(0, len(whole)))]
        case 2:
            return encode(message) + draw(st.binary(min_size=1, max_size=8) | st.just(encode(message)))
    mutable = bytearray(encode(message))
    for _ in range(draw(st.integers(1, 8))):
        mutable[draw(st.integers(0, len(mutable) - 1))] = draw(st.integers(0, 255))
    return bytes(mutable)
