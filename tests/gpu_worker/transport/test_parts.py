import asyncio
import os
import secrets
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mell_gpu_worker.transport import factory
from mell_gpu_worker.transport.addresses import Address, address_towards
from mell_gpu_worker.transport.base import ProtocolError, RefusedError, TransportOptions
from mell_gpu_worker.transport.checksum import checksum_of
from mell_gpu_worker.transport.chunks import MAX_CHUNK_BYTES, Slots, cut, scatter
from mell_gpu_worker.transport.factory import TransportUnavailableError, open_transport
from mell_gpu_worker.transport.frames import FRAME_BYTES, MAX_GROUP, Answer, Chunk, Group, Hello, Verdict
from mell_gpu_worker.transport.progress import Pending, ProgressDriver
from mell_gpu_worker.transport.regions import DeviceBytes, DeviceRegion, HostRegion, region_of
from mell_gpu_worker.transport.self_test import measure, measure_itself, offer_probe, serve_probe
from tests.gpu_worker.transport.stage import Stage, eventually

MIB = 2**20
U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
CHUNKS = st.builds(Chunk, slot=U32, count=U32, offset=U64, length=U32, checksum=st.none() | U64)


@given(
    st.builds(Group, number=U32, chunks=st.lists(CHUNKS, min_size=1, max_size=MAX_GROUP), last=st.booleans()),
    st.builds(Hello, secret=st.binary(min_size=32, max_size=32), size_bytes=U64, tag=U64),
    st.builds(Verdict, code=st.integers(0, 5), tag=U64),
    st.builds(Answer, code=st.integers(0, 2)),
)
def test_frames_come_back_as_they_were(group: Group, hello: Hello, verdict: Verdict, answer: Answer) -> None:
    """Every frame has the one size and decodes to what was encoded."""
    for frame in (group, hello, verdict, answer):
        encoded = frame.encode()
        assert len(encoded) == FRAME_BYTES
        assert type(frame).decode(encoded) == frame


@given(st.binary(min_size=FRAME_BYTES, max_size=FRAME_BYTES))
def test_foreign_frames_are_known_as_such(frame: bytes) -> None:
    """Bytes that are not a greeting or an answer raise `ProtocolError` and nothing else."""
    for kind in (Hello, Verdict):
        with pytest.raises(ProtocolError):
            kind.decode(b"\0" + frame[1:])
    with pytest.raises(ProtocolError):
        Answer.decode(b"\0" + frame[1:])


@given(
    st.lists(st.integers(0, 300), min_size=1, max_size=20),
    st.integers(8, 128),
    st.randoms(use_true_random=False),
)
def test_what_is_cut_fits_together_again(sizes: list[int], chunk_bytes: int, random: Any) -> None:
    """Any round of any slots, cut into chunks of any size, fills exactly those slots; no chunk is over the size."""
    sent = [bytes((slot + place) % 251 for place in range(size)) for slot, size in enumerate(sizes)]
    buffers = [bytearray(size) for size in sizes]
    slots = Slots([region_of(buffer, writable=True) for buffer in buffers])
    order = random.sample(range(len(sizes)), random.randint(0, len(sizes)))
    for piece in cut([(slot, region_of(sent[slot], writable=False)) for slot in order], chunk_bytes):
        data = piece.payload()
        assert isinstance(data, HostRegion)
        assert data.nbytes == piece.nbytes <= chunk_bytes
        chunk = Chunk(piece.slot, len(piece.regions), piece.offset, piece.nbytes, checksum_of(data))
        scatter(data.raw, slots.regions_of(chunk))
    assert sorted(slots.finish_round()) == sorted(order)
    for slot, buffer in enumerate(buffers):
        assert buffer == (sent[slot] if slot in order else bytes(sizes[slot]))
        if slot in order:
            with pytest.raises(ProtocolError):
                slots.regions_of(Chunk(slot, 1, 0, sizes[slot], None))


@dataclass
class Cuda:
    """What CUDA libraries show of their memory."""

    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None
    readonly: bool = False
    pointer: int = 0x7F00_0000_0000
    __cuda_array_interface__: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        """Describe float16 memory."""
        self.__cuda_array_interface__ = {
            "shape": self.shape,
            "typestr": "<f2",
            "strides": self.strides,
            "data": (self.pointer, self.readonly),
            "version": 3,
        }


def test_cuda_memory_is_bytes_at_an_address() -> None:
    """CUDA memory keeps address and size, is cut by address and coarsely, never packed, and has no checksum of ours."""
    block = Cuda((9, 1024, 1024), strides=(2 * MIB, 2048, 2))
    region = region_of(block, writable=True)
    assert isinstance(region, DeviceRegion)
    assert region.nbytes == 18 * MIB
    pieces = list(cut([(0, region), (1, region_of(Cuda((4,)), writable=False))], 1000))
    assert [(piece.slot, piece.offset, piece.nbytes, piece.packed) for piece in pieces] == [
        (0, 0, MAX_CHUNK_BYTES, False),
        (0, MAX_CHUNK_BYTES, 2 * MIB, False),
        (1, 0, 8, False),
    ]
    second = pieces[1].payload().raw
    assert isinstance(second, DeviceBytes)
    assert second.__cuda_array_interface__["data"] == (block.pointer + MAX_CHUNK_BYTES, False)
    assert second.__cuda_array_interface__["shape"] == (2 * MIB,)
    assert checksum_of(region) is None
    with pytest.raises(ValueError, match="not contiguous"):
        region_of(Cuda((2, 3), strides=(12, 2)), writable=False)
    with pytest.raises(ValueError, match="read-only"):
        region_of(Cuda((2,), readonly=True), writable=True)


def test_addresses() -> None:
    """An address comes back as it was written; others are refused with the text."""
    for text in ("tcp://127.0.0.1:4000", "tcp://[::1]:4000", "tcp://node-7.cluster:1"):
        assert str(Address.parse(text, "tcp")) == text
    for text in ("ucx://127.0.0.1:4000", "", "tcp://", "tcp://host", "tcp://host:99999", "tcp://[::1:5"):
        with pytest.raises(RefusedError):
            Address.parse(text, "tcp")


class Worker:
    """A UCX worker that moves when told to."""

    def __init__(self) -> None:
        self.epoll_file_descriptor, self.signal = os.pipe()
        self.moves_left = 0
        self.progressed = self.armed = self.busy = 0

    def progress_once(self) -> bool:
        """Move once if something is left."""
        self.progressed += 1
        self.moves_left -= self.moves_left > 0
        return self.moves_left > 0

    def cancel_inflight_requests(self) -> int:
        """Nothing to cancel."""
        return 0

    def arm(self) -> bool:
        """Arm, unless told to be busy."""
        self.armed += 1
        self.busy -= self.busy > 0
        return self.busy == 0


@dataclass
class Request:
    """A request that completes when told to."""

    completed: bool = False
    error: Exception | None = None

    def check_error(self) -> None:
        """Raise the error."""
        if self.error is not None:
            raise self.error


async def test_the_driver_sleeps_until_something_happens() -> None:
    """With nothing to do the driver calls nothing but its slow tick; an event makes it progress until nothing moves."""
    worker = Worker()
    driver = ProgressDriver(worker, OSError, tick_s=3600)
    await eventually(lambda: worker.armed == 1)
    calls = worker.progressed
    await asyncio.sleep(0.1)
    assert worker.progressed == calls
    worker.moves_left, worker.busy = 500, 2
    os.write(worker.signal, b"!")
    await eventually(lambda: worker.moves_left == 0 and worker.armed > 1)
    os.read(worker.epoll_file_descriptor, 1)
    driver.close()
    os.close(worker.signal)
    os.close(worker.epoll_file_descriptor)


async def test_the_driver_completes_requests_once() -> None:
    """Finished requests are told with their error, each once; others stay; the tick finds those without an event."""
    worker = Worker()
    driver = ProgressDriver(worker, OSError)
    good, bad, late = Request(), Request(error=OSError("broken")), Request()
    told: list[tuple[str, Exception | None]] = []

    def tell(name: str) -> Callable[[Exception | None], None]:
        return lambda error: told.append((name, error))

    for name, request in (("good", good), ("bad", bad), ("late", late)):
        driver.submit(Pending(request, b"", tell(name), owner=worker))
    assert not told
    good.completed = bad.completed = True
    driver.wake()
    await eventually(lambda: len(told) == 2)
    assert (told, driver.pending) == ([("good", None), ("bad", bad.error)], 1)
    late.completed = True
    await eventually(lambda: len(told) == 3)
    driver.close()
    os.close(worker.signal)
    os.close(worker.epoll_file_descriptor)


async def test_others_get_their_turn_while_many_requests_end() -> None:
    """Requests that end together are told of over several turns of the loop, in order."""
    worker = Worker()
    driver = ProgressDriver(worker, OSError, tick_s=3600)
    turn, told = 0, []
    for number in range(100):
        request = Request(completed=True)
        driver.submit(Pending(request, b"", lambda _, number=number: told.append((number, turn)), owner=worker))
    while driver.pending:
        turn += 1
        await asyncio.sleep(0)
    assert [number for number, _ in told] == list(range(100))
    assert max(Counter(turn for _, turn in told).values()) <= 10
    driver.close()
    os.close(worker.signal)
    os.close(worker.epoll_file_descriptor)


async def test_the_factory_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown kind, a port in use and a missing ucxx each raise one line; `auto` falls back to TCP."""
    with pytest.raises(TransportUnavailableError, match="use auto, ucx or tcp"):
        await open_transport(TransportOptions(kind="pigeon"), lambda event, fields: None)
    monkeypatch.setattr(factory, "ucx_installed", lambda: False)
    first = await open_transport(TransportOptions(), lambda event, fields: None)
    assert first.address.startswith("tcp://")
    port = Address.parse(first.address, "tcp").port
    with pytest.raises(TransportUnavailableError, match="choose another port"):
        await open_transport(TransportOptions(kind="tcp", port=port), lambda event, fields: None)
    await first.close()
    monkeypatch.setitem(__import__("sys").modules, "mell_gpu_worker.transport.ucx", None)
    with pytest.raises(TransportUnavailableError, match=r"install mell\[ucx\]"):
        await open_transport(TransportOptions(kind="ucx"), lambda event, fields: None)


async def test_ucx_is_chosen_and_its_troubles_named() -> None:
    """`auto` takes UCX where it is installed; a device that does not exist is named."""
    transport = await open_transport(TransportOptions(ucx_net_devices="lo", ucx_tls="tcp"), lambda event, fields: None)
    assert transport.address.startswith("ucx://")
    await transport.close()
    await transport.close()


async def test_tcp_does_not_take_cuda_memory() -> None:
    """Without UCX, CUDA memory is refused where it is offered, by name."""
    transport = await open_transport(TransportOptions(kind="tcp"), lambda event, fields: None)
    with pytest.raises(ValueError, match="needs the UCX transport"):
        transport.offer(secrets.token_bytes(32), [Cuda((5,))], 1.0)
    await transport.close()


async def test_a_lane_is_measured(stage: Stage) -> None:
    """A probe gives bandwidth and latency of the real path, to another transport and to itself."""
    source, target = await stage.transport(), await stage.transport()
    secret = secrets.token_bytes(32)
    serving = asyncio.create_task(serve_probe(offer_probe(target, secret, 60.0), 60.0))
    for lane in (await measure(source, target.address, secret, 60.0), await measure_itself(source, 60.0)):
        assert lane.bytes_per_s > 0
        assert lane.latency_s > 0
    await serving


async def test_this_machines_address_is_the_one_on_the_way_to_the_broker() -> None:
    """On loopback for a broker on loopback."""
    assert await address_towards("nats://127.0.0.1:4222", 4222) == "127.0.0.1"
    assert await address_towards("nats://user:secret@127.0.0.1", 4222) == "127.0.0.1"
    assert await address_towards("127.0.0.1", 4222) == "127.0.0.1"
