import struct
import sys
from typing import Any
from unittest import mock

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter, ValidationError

from mell_shared.codec import InvalidMessageError, decode, encode
from mell_shared.messages.base import Message, Uint32Column
from mell_shared.messages.frontend import TOKENS_GENERATED, StreamStatus, TokensGenerated
from mell_shared.messages.sampling import SamplingParams
from mell_shared.messages.scheduler import SCHEDULER_EVENT, WorkerReport
from mell_shared.messages.worker import WORKER_COMMAND, Submit
from tests.shared.messages import ADAPTERS, MESSAGES, messages_of

every_message = pytest.mark.parametrize("model", MESSAGES, ids=lambda model: model.__name__)
every_door = pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=list(ADAPTERS))
few = settings(max_examples=12)

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8)
    | st.datetimes().map(lambda at: msgpack.Timestamp(at.second)),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8) | st.integers(0, 9), inner, max_size=4)
    ),
    max_leaves=12,
)


def raw(value: Any) -> bytes:
    """Return any value as msgpack, valid message or not."""
    packed: bytes = msgpack.packb(value)
    return packed


def decoded(adapter: TypeAdapter[Any], data: bytes) -> Any:
    """Return the message in `data`, or None where it is invalid; any other exception ends the test."""
    try:
        return decode(adapter, data)
    except InvalidMessageError:
        return None


@every_message
@few
@given(data=st.data())
def test_every_message_survives_the_wire(model: type[Message], data: st.DataObject) -> None:
    """Encoded and decoded, with unknown fields forbidden, a message equals itself."""
    message = data.draw(messages_of(model))
    assert decode(TypeAdapter(model), encode(message), unknown_fields="forbid") == message


@every_message
@few
@given(data=st.data())
def test_the_next_release_s_fields_are_ignored_at_every_depth(model: type[Message], data: st.DataObject) -> None:
    """A field that this release does not know changes nothing, wherever it stands; tests can forbid it."""
    message = data.draw(messages_of(model))
    newer = raw(with_new_fields(model, message.model_dump()))
    adapter = TypeAdapter(model)
    assert decode(adapter, newer) == message
    with pytest.raises(InvalidMessageError, match="from_the_next_release"):
        decode(adapter, newer, unknown_fields="forbid")


def with_new_fields(model: type[BaseModel], dumped: dict[str, Any]) -> dict[str, Any]:
    """Add a field to a dumped message and to the messages in it, but not to its plain dictionaries."""

    def grown(value: Any) -> Any:
        if isinstance(value, dict) and value and all(isinstance(key, str) for key in value):
            return {**{key: grown(inner) for key, inner in value.items()}, "from_the_next_release": [1, {"a": b"b"}]}
        if isinstance(value, list | tuple):
            return [grown(inner) for inner in value]
        if isinstance(value, dict):
            return {key: grown(inner) for key, inner in value.items()}
        return value

    assert model.model_fields.keys() == dumped.keys()
    return {**grown(dumped), "from_the_next_release": 1}


@every_message
def test_the_previous_release_s_messages_lack_only_fields_with_defaults(model: type[Message]) -> None:
    """A message of required fields alone is accepted: a new field needs a default, or a new protocol number."""
    needed = {name: field for name, field in model.model_fields.items() if field.is_required()}

    @settings(max_examples=5)
    @given(messages_of(model))
    def check(message: BaseModel) -> None:
        full = message.model_dump()
        columns = {name for name in full if isinstance(full[name], bytes | list | tuple)}
        kept = {name: full[name] for name in full if name in needed or name in columns}
        assert isinstance(decode(TypeAdapter(model), raw(kept)), model)

    check()


@every_door
@settings(max_examples=60)
@given(data=st.binary(max_size=200) | values.map(raw))
def test_random_bytes_are_an_invalid_message_or_a_message(adapter: TypeAdapter[Any], data: bytes) -> None:
    """Whatever arrives, decoding returns a message or raises `InvalidMessageError`, and nothing else."""
    assert isinstance(decoded(adapter, data), Message | None)


@every_message
@few
@given(data=st.data())
def test_a_damaged_message_is_invalid_or_a_message(model: type[Message], data: st.DataObject) -> None:
    """A message cut short, or with one byte changed, raises nothing but `InvalidMessageError`."""
    whole = encode(data.draw(messages_of(model)))
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(InvalidMessageError, match="not msgpack"):
        decode(TypeAdapter(model), whole[:cut])
    changed = whole[:cut] + data.draw(st.binary(min_size=1, max_size=1)) + whole[cut + 1 :]
    assert isinstance(decoded(TypeAdapter(model), changed), model | None)


@every_message
@few
@given(data=st.data())
def test_a_field_of_the_wrong_kind_is_invalid_or_a_message(model: type[Message], data: st.DataObject) -> None:
    """Any value in place of any field raises nothing but `InvalidMessageError`."""
    dumped = data.draw(messages_of(model)).model_dump()
    name = data.draw(st.sampled_from(sorted(dumped) or ["kind"]))
    changed = raw({**dumped, name: data.draw(values)})
    assert isinstance(decoded(TypeAdapter(model), changed), model | None)


REPORT = WorkerReport(worker="w", number=1, free_blocks=1, used_blocks=0).model_dump()
TOKENS = TokensGenerated(
    worker="w", sequences=("s",), generations=[1], first_indices=[0], counts=[1], token_ids=[7]
).model_dump()
SUBMIT = Submit(
    sequence="s", generation=1, frontend="f", model="m", prompt_ids=[1], sampling=SamplingParams(seed=1)
).model_dump()


@pytest.mark.parametrize(
    ("adapter", "value", "told"),
    [
        (SCHEDULER_EVENT, {**REPORT, "number": -1}, "number"),
        (SCHEDULER_EVENT, {**REPORT, "number": 1.5}, "number"),
        (SCHEDULER_EVENT, {**REPORT, "worker": ""}, "worker"),
        (SCHEDULER_EVENT, {**REPORT, "worker": "x" * 201}, "worker"),
        (SCHEDULER_EVENT, {**REPORT, "kind": "nonsense"}, "nonsense"),
        (SCHEDULER_EVENT, {**REPORT, "kind": ["worker_report"]}, "kind"),
        (SCHEDULER_EVENT, {key: REPORT[key] for key in REPORT if key != "kind"}, "kind"),
        (SCHEDULER_EVENT, {**REPORT, "sequences": ["s"]}, "unequal length"),
        (SCHEDULER_EVENT, {**REPORT, "tokens": b"\1\0\0"}, "whole 4-byte words"),
        (SCHEDULER_EVENT, {**REPORT, "tokens": [2**32]}, "tokens"),
        (SCHEDULER_EVENT, [], "dictionary"),
        (SCHEDULER_EVENT, None, "dictionary"),
        (TOKENS_GENERATED, {**TOKENS, "counts": struct.pack("<I", 2)}, "do not add up"),
        (TOKENS_GENERATED, {**TOKENS, "counts": struct.pack("<I", 2**32 - 1)}, "do not add up"),
        (TOKENS_GENERATED, {**TOKENS, "first_indices": b""}, "unequal length"),
        (TOKENS_GENERATED, {**TOKENS, "finished": {0: "bored"}}, "finished"),
        (TOKENS_GENERATED, {**TOKENS, "finished": {-1: "stop"}}, "finished"),
        (TOKENS_GENERATED, {**TOKENS, "logprobs": {0: [{"logprob": float("nan")}]}}, "finite"),
        (WORKER_COMMAND, {**SUBMIT, "generation": 0}, "generation"),
        (WORKER_COMMAND, {**SUBMIT, "generation": 2**32}, "generation"),
        (WORKER_COMMAND, {**SUBMIT, "sampling": {"seed": 2**64 - 1}}, "seed"),
        (WORKER_COMMAND, {**SUBMIT, "sampling": {"seed": 1, "temperature": float("nan")}}, "finite"),
        (WORKER_COMMAND, {**SUBMIT, "sampling": {"seed": 1, "temperature": float("inf")}}, "temperature"),
        (WORKER_COMMAND, {**SUBMIT, "sampling": {"seed": 1, "logit_bias": {7: float("nan")}}}, "logit_bias"),
        (WORKER_COMMAND, {**SUBMIT, "prompt_ids": [-1]}, "prompt_ids"),
    ],
)
def test_what_is_wrong_is_told(adapter: TypeAdapter[Any], value: Any, told: str) -> None:
    """Each rule of the protocol, broken, is refused with the place or the rule in one line."""
    with pytest.raises(InvalidMessageError) as caught:
        decode(adapter, raw(value))
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",  # a byte that msgpack never uses
        b"\x91" * 2000,  # lists in lists
        b"\x81\x01" * 2000,  # maps in maps
        b"\xdd\xff\xff\xff\xff",  # a list said to be four billion long
        b"\xdf\xff\xff\xff\xff",  # a map said to be
        b"\xc6\xff\xff\xff\xff",  # bytes said to be
        b"\x81\x90\x01",  # a list as a key
        b"\xa2\xff\xfe",  # no UTF-8
        b"\xd6\xff\x00",  # a timestamp cut short
        raw(REPORT) + b"\x00",  # more than one value
    ],
)
def test_hostile_bytes_are_refused(data: bytes) -> None:
    """Deep, lying or broken msgpack is refused before anything is built from it."""
    with pytest.raises(InvalidMessageError, match="not msgpack"):
        decode(SCHEDULER_EVENT, data)


def test_a_long_list_of_lies_reserves_no_memory() -> None:
    """A list longer than any of ours is refused although its bytes are there."""
    with pytest.raises(InvalidMessageError, match="not msgpack"):
        decode(SCHEDULER_EVENT, raw({**REPORT, "sequences": ["s"] * (2**16 + 1)}))


@pytest.mark.parametrize("secret", ["the user's prompt", "x" * 100_000])
def test_an_error_does_not_quote_content_at_length(secret: str) -> None:
    """What an error says goes to logs: values never, keys and tags only in part; nor does the cause hold them."""
    for broken in (
        {**SUBMIT, "prompt_ids": secret},
        {**SUBMIT, "sampling": {"seed": secret, "grammar": {"text": [secret]}}},
    ):
        with pytest.raises(InvalidMessageError) as caught:
            decode(WORKER_COMMAND, raw(broken))
        assert secret not in str(caught.value)
        assert caught.value.__suppress_context__
    with pytest.raises(InvalidMessageError) as caught:
        decode(WORKER_COMMAND, raw({"kind": "k" * 100_000}))
    assert len(str(caught.value)) < 1000


def test_every_fault_is_counted_and_the_first_named() -> None:
    """Several faults make one line that says how many there are."""
    with pytest.raises(InvalidMessageError, match=r"and 1 more"):
        decode(SCHEDULER_EVENT, raw({**REPORT, "number": -1, "free_blocks": -1}))


def test_columns_are_packed_little_endian() -> None:
    """A column's bytes are the same on every machine, and a plain list is understood too."""
    message = StreamStatus(worker="w", sequences=("a",), generations=[258], next_indices=[2**32 - 1], ended=[0])
    wire = msgpack.unpackb(encode(message))
    assert wire["generations"] == b"\x02\x01\x00\x00"
    assert wire["next_indices"] == b"\xff\xff\xff\xff"
    adapter = TypeAdapter(StreamStatus)
    assert decode(adapter, raw({**wire, "generations": [258]})) == message


@given(st.lists(st.integers(0, 2**32 - 1)))
def test_a_column_s_bytes_do_not_depend_on_the_machine(column: list[int]) -> None:
    """Packing gives little-endian words; a machine of the other byte order swaps both ways."""
    adapter: TypeAdapter[list[int]] = TypeAdapter(Uint32Column)
    assert adapter.dump_python(column) == struct.pack(f"<{len(column)}I", *column)
    assert adapter.validate_python(adapter.dump_python(column)) == column
    with mock.patch.object(sys, "byteorder", "big"):
        swapped = adapter.dump_python(column)
        assert swapped == struct.pack(f">{len(column)}I", *column)
        assert adapter.validate_python(swapped) == column


def test_messages_are_frozen_and_refuse_nan_when_made() -> None:
    """A message cannot be changed after its one validation, and cannot be made of nonsense."""
    with pytest.raises(ValidationError, match="frozen"):
        StreamStatus(worker="w").worker = "x"  # type: ignore[misc]
    with pytest.raises(ValidationError, match="finite"):
        SamplingParams(seed=1, temperature=float("nan"))


@every_message
def test_every_message_says_what_it_is_for(model: type[Message]) -> None:
    """Each message has a description of its own: the protocol's reference is made of them."""
    assert model.__doc__
    assert model.__doc__ != Message.__doc__
