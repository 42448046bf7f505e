"""What comes over the broker: no bytes crash a decoder, and no message that decodes crashes a core."""

import gc
import random
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter

from mell_frontend.generation import SequenceRequest
from mell_frontend.stream.core import FrontendCore
from mell_frontend.stream.events import ControlArrived, PlaceAnswered, SequenceOpened, Ticked, TokensArrived
from mell_frontend.stream.limits import StreamLimits
from mell_scheduler.core import CoreSettings, LeadershipTaken, PlaceRequested, SchedulerCore, Tick
from mell_scheduler.policy import PolicySettings, make_policy
from mell_shared.codec import InvalidMessageError, decode, encode
from mell_shared.messages.frontend import FRONTEND_CONTROL, TOKENS_GENERATED
from mell_shared.messages.sampling import SamplingParams
from mell_shared.messages.scheduler import PLACE_REPLY, PLACE_REQUEST, SCHEDULER_EVENT
from tests.fuzz.budget import FACTOR, examples
from tests.fuzz.hostile import NAMES, damaged, junk, valid
from tests.shared.messages import ADAPTERS

Count = Callable[[str], None]
every_door = pytest.mark.parametrize("door", sorted(ADAPTERS))


def read(adapter: TypeAdapter[Any], data: bytes) -> BaseModel | None:
    """Return the message in `data`, None where there is none; anything else that is raised ends the test."""
    try:
        message: BaseModel = decode(adapter, data)
    except InvalidMessageError:
        return None
    return message


@every_door
def test_no_bytes_crash_a_decoder(door: str, tried: Count) -> None:
    """Random bytes, and valid messages damaged in every way, are a message or an `InvalidMessageError`."""
    adapter = ADAPTERS[door]

    @examples(60)
    @given(st.binary(max_size=400) | damaged(adapter))
    def check(data: bytes) -> None:
        tried(f"decoder {door}")
        message = read(adapter, data)
        if message is not None:
            encode(message)

    check()


@examples(60)
@given(st.lists(st.tuples(valid(SCHEDULER_EVENT) | valid(PLACE_REQUEST), st.integers(0, 3_000_000)), max_size=40))
def test_no_message_crashes_the_scheduler(tried: Count, story: list[tuple[Any, int]]) -> None:
    """Whatever workers and frontends say, in whatever order, the core answers and its indices agree."""
    core = SchedulerCore(
        make_policy("repack", PolicySettings()), CoreSettings(queue_limit=8, queue_wait_us=5_000_000), 0
    )
    core.handle(LeadershipTaken(1), 0)
    now_us = 0
    for number, (message, step_us) in enumerate(story):
        now_us += step_us
        tried("scheduler core")
        event = PlaceRequested(f"h{number}", message) if message.kind == "place" else message
        core.handle(event, now_us)
        core.handle(Tick(), now_us)
        core.check()


def opened(name: str) -> SequenceOpened:
    """A sequence that a client asked for."""
    return SequenceOpened(SequenceRequest(name, "m", [1, 2, 3], SamplingParams(seed=1, max_tokens=8)))


@examples(60)
@given(
    st.lists(
        st.tuples(valid(TOKENS_GENERATED) | valid(FRONTEND_CONTROL) | valid(PLACE_REPLY), st.integers(0, 3_000_000)),
        max_size=40,
    )
)
def test_no_message_crashes_the_frontend(tried: Count, story: list[tuple[Any, int]]) -> None:
    """Whatever workers and the scheduler say, the arbiter goes on and delivers no more than was asked for."""
    core, now_us, delivered = FrontendCore("f", StreamLimits()), 0, dict.fromkeys(NAMES, 0)
    for name in NAMES:
        core.handle(opened(name), 0)
    for message, step_us in story:
        now_us += step_us
        tried("frontend core")
        for event in frontend_events(message):
            for command in core.handle(event, now_us):
                if type(command).__name__ == "DeliverTokens":
                    delivered[command.sequence] += len(command.token_ids)  # type: ignore[union-attr]
    assert all(count <= 8 for count in delivered.values())


def frontend_events(message: Any) -> list[Any]:
    """Return the events that a message becomes in the frontend's shell."""
    if message.kind == "tokens":
        return [TokensArrived(message), Ticked()]
    if message.kind in {"placed", "queued", "rejected"}:
        return [PlaceAnswered(name, 1, message) for name in NAMES]
    return [ControlArrived("reply", message), Ticked()]


def hostile_bytes(source: random.Random, messages: list[bytes]) -> bytes:
    """Return one damaged message, by the seed alone."""
    data = bytearray(source.choice(messages))
    for _ in range(source.randrange(4)):
        data[source.randrange(len(data))] = source.randrange(256)
    return bytes(data[: source.randrange(1, len(data) + 1)]) if source.random() < 0.3 else bytes(data)


def test_memory_stays_flat(tried: Count) -> None:
    """After thousands of damaged messages nothing of them is kept."""
    source = random.Random(5)
    seeds: dict[str, list[bytes]] = {door: [] for door in ADAPTERS}

    def collect(door: str) -> None:
        @examples(10)
        @given(damaged(ADAPTERS[door]))
        def note(data: bytes) -> None:
            if len(seeds[door]) < 10 and data:
                seeds[door].append(data)

        note()

    for door in ADAPTERS:
        collect(door)

    def batch() -> int:
        for door, adapter in ADAPTERS.items():
            for _ in range(100 * FACTOR):
                tried("decoders, for memory")
                read(adapter, hostile_bytes(source, seeds[door]))
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        batch()
        before = batch()
        assert batch() - before < 64 * 1024
    finally:
        tracemalloc.stop()


@examples(30)
@given(junk)
def test_a_length_that_lies_reserves_nothing(tried: Count, value: Any) -> None:
    """What a decoder needs at most is a small multiple of what came."""
    import msgpack

    data = msgpack.packb({"kind": "worker_report", "sequences": value})
    tried("decoders, for memory")
    tracemalloc.start()
    try:
        read(SCHEDULER_EVENT, data)
        assert tracemalloc.get_traced_memory()[1] < 512 * 1024 + 200 * len(data)
    finally:
        tracemalloc.stop()
