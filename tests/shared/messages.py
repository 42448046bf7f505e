"""Every message of the protocol, found by itself, and Hypothesis strategies that build valid ones."""

import importlib
import pkgutil
import types
from collections.abc import Callable
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from hypothesis import strategies as st
from pydantic import BaseModel, StringConstraints, TypeAdapter
from pydantic.fields import FieldInfo

import mell_shared.messages
from mell_shared.messages.base import Message
from mell_shared.messages.frontend import TokensGenerated

MODULES = [
    importlib.import_module(f"mell_shared.messages.{found.name}")
    for found in pkgutil.iter_modules(mell_shared.messages.__path__)
]
MESSAGES: list[type[Message]] = sorted(
    {
        value
        for module in MODULES
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Message) and value is not Message
    },
    key=lambda message: message.__name__,
)
ADAPTERS: dict[str, TypeAdapter[Any]] = {
    name: value for module in MODULES for name, value in vars(module).items() if isinstance(value, TypeAdapter)
}
"""The doors: one adapter per union that a receiver decodes."""


def messages_of(model: type[BaseModel]) -> st.SearchStrategy[BaseModel]:
    """Return valid messages of `model`; all lists in one message have the same length, as columns must."""
    rows = st.integers(0, 4)
    if model is TokensGenerated:
        return rows.flatmap(lambda count: _values(model, count).flatmap(_with_tokens)).map(lambda made: model(**made))
    return rows.flatmap(lambda count: _values(model, count)).map(lambda made: model(**made))


def _values(model: type[BaseModel], rows: int) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({name: _field(field, rows) for name, field in model.model_fields.items()})


@st.composite
def _with_tokens(draw: st.DrawFn, made: dict[str, Any]) -> dict[str, Any]:
    counts = [count % 4 for count in made["counts"]]
    ids = draw(st.lists(st.integers(0, 2**32 - 1), min_size=sum(counts), max_size=sum(counts)))
    return {**made, "counts": counts, "token_ids": ids}


def _field(field: FieldInfo, rows: int) -> st.SearchStrategy[Any]:
    return _annotated(field.annotation, list(field.metadata), rows)


def _annotated(annotation: Any, metadata: list[Any], rows: int) -> st.SearchStrategy[Any]:
    while get_origin(annotation) is Annotated:
        annotation, *more = get_args(annotation)
        for extra in more:
            metadata = metadata + (extra.metadata if isinstance(extra, FieldInfo) else [extra])
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return st.one_of([_annotated(argument, metadata, rows) for argument in arguments])
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin in (list, tuple):
        items = st.lists(_annotated(arguments[0], [], rows), min_size=rows, max_size=rows)
        return items if origin is list else items.map(tuple)
    if origin is dict:
        return st.dictionaries(*(_annotated(argument, [], rows) for argument in arguments), max_size=3)
    return _plain(annotation, metadata)


def _plain(annotation: Any, metadata: list[Any]) -> st.SearchStrategy[Any]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return messages_of(annotation)
    makers: dict[Any, Callable[[list[Any]], st.SearchStrategy[Any]]] = {
        int: _integers,
        float: _floats,
        str: _texts,
        bool: lambda _: st.booleans(),
        bytes: lambda _: st.binary(max_size=50),
        types.NoneType: lambda _: st.none(),
    }
    return makers[annotation](metadata)


def _bounds(metadata: list[Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for limit in metadata:
        for kind, name in (("Ge", "ge"), ("Gt", "gt"), ("Le", "le"), ("Lt", "lt")):
            if isinstance(limit, getattr(annotated_types, kind)):
                found[name] = getattr(limit, name)
    return found


def _integers(metadata: list[Any]) -> st.SearchStrategy[int]:
    found = _bounds(metadata)
    low = found.get("ge", found["gt"] + 1 if "gt" in found else -(2**63))
    high = found.get("le", found["lt"] - 1 if "lt" in found else 2**63 - 1)
    return st.integers(low, high)


def _floats(metadata: list[Any]) -> st.SearchStrategy[float]:
    found = _bounds(metadata)
    return st.floats(
        found.get("ge", found.get("gt")),
        found.get("le", found.get("lt")),
        exclude_min="gt" in found,
        exclude_max="lt" in found,
        allow_nan=False,
        allow_infinity=False,
    )


def _texts(metadata: list[Any]) -> st.SearchStrategy[str]:
    limits = [limit for limit in metadata if isinstance(limit, StringConstraints)]
    least = max((limit.min_length or 0 for limit in limits), default=0)
    return st.text(min_size=least, max_size=12)
