import asyncio
import secrets
import socket
import tracemalloc
from dataclasses import replace

import pytest

from mell_gpu_worker.transport.addresses import Address
from mell_gpu_worker.transport.base import CorruptedError, LinkLostError, ProtocolError, RefusedError, TransportError
from mell_gpu_worker.transport.checksum import checksum_of
from mell_gpu_worker.transport.frames import (
    ACCEPTED,
    CORRUPTED,
    FRAME_BYTES,
    MAX_GROUP,
    OTHER_VERSION,
    SENSELESS,
    Answer,
    Chunk,
    Group,
    Hello,
    Verdict,
)
from mell_gpu_worker.transport.link import Link
from mell_gpu_worker.transport.regions import HostRegion
from tests.gpu_worker.transport.peer import LONG_S
from tests.gpu_worker.transport.stage import Stage, eventually

SIZE = 4096


async def test_only_the_secret_and_the_exact_size_open_an_offer(stage: Stage) -> None:
    """A wrong secret, another size, a size over the limit and a second source are refused with the reason."""
    source, target = await stage.transport(), await stage.transport(max_transfer_bytes=SIZE)
    secret = secrets.token_bytes(32)
    incoming = target.offer(secret, [bytearray(SIZE)], LONG_S)
    for named, size_bytes, reason in (
        (secrets.token_bytes(32), SIZE, "no offer with this secret"),
        (secret, SIZE - 1, "size announced is not"),
        (secret, 0, "size announced is not"),
        (secret, 2**60, "over the target's limit"),
    ):
        with pytest.raises(RefusedError, match=reason):
            await source.connect(target.address, named, size_bytes, LONG_S)
    assert not incoming.connected
    outgoing = await source.connect(target.address, secret, SIZE, LONG_S)
    with pytest.raises(RefusedError, match="taken already"):
        await source.connect(target.address, secret, SIZE, LONG_S)
    await outgoing.send([(0, bytes(SIZE))], LONG_S)
    assert (await incoming.receive(LONG_S)).slots == (0,)
    await outgoing.close()
    await incoming.close()
    with pytest.raises(RefusedError, match="no offer"):
        await source.connect(target.address, secret, SIZE, LONG_S)
    assert [event for event, _ in stage.told] == ["transport_refused"] * 6


async def test_offers_are_bounded(stage: Stage) -> None:
    """More offers than the limit, larger ones, and a secret used twice are refused; closing one makes room."""
    target = await stage.transport(max_offers=2, max_transfer_bytes=SIZE)
    first, second = secrets.token_bytes(32), secrets.token_bytes(32)
    with pytest.raises(RefusedError, match="over the limit"):
        target.offer(first, [bytearray(SIZE), bytearray(1)], LONG_S)
    offer = target.offer(first, [bytearray(SIZE)], LONG_S)
    with pytest.raises(ValueError, match="one offer only"):
        target.offer(first, [bytearray(SIZE)], LONG_S)
    target.offer(second, [bytearray(SIZE)], LONG_S)
    with pytest.raises(RefusedError, match="the limit"):
        target.offer(secrets.token_bytes(32), [bytearray(1)], LONG_S)
    await offer.close()
    target.offer(secrets.token_bytes(32), [bytearray(1)], LONG_S)


async def test_strangers_are_turned_away(stage: Stage) -> None:
    """Garbage and an early end cost nothing but a line in the log; a real source is served meanwhile."""
    source, target = await stage.transport(), await stage.transport(hello_timeout_s=60.0)
    garbage = await stage.link(source, target.address)
    await garbage.send_frame(b"\x16\x03\x01!" * (FRAME_BYTES // 4))
    left = await stage.link(source, target.address)
    left.close()
    secret = secrets.token_bytes(32)
    incoming = target.offer(secret, [bytearray(SIZE)], LONG_S)
    outgoing = await source.connect(target.address, secret, SIZE, LONG_S)
    await outgoing.send([(0, bytes(SIZE))], LONG_S)
    garbage.close()
    await eventually(lambda: target.tasks == 1)
    reasons = [fields.get("reason", "") for event, fields in stage.told if event == "transport_stranger_turned_away"]
    assert any("first bytes" in reason for reason in reasons)
    await outgoing.close()
    await incoming.close()


async def test_bytes_from_no_worker_at_all(stage: Stage) -> None:
    """Plain sockets that send HTTP, nothing, or half a greeting do no harm to the data port."""
    if stage.kind == "memory":
        strangers = [await stage.link(None, (await stage.transport(hello_timeout_s=0.3)).address)]
        await eventually(lambda: any("named no secret" in str(fields) for _, fields in stage.told))
        strangers[0].close()
        return
    source, target = await stage.transport(), await stage.transport(hello_timeout_s=60.0)
    port = Address.parse(target.address, stage.kind).port
    sockets = [socket.create_connection(("127.0.0.1", port)) for _ in range(4)]
    sockets[0].sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 1000)
    sockets[1].sendall(b"MELLKV")
    sockets[2].close()
    secret = secrets.token_bytes(32)
    incoming = target.offer(secret, [bytearray(SIZE)], LONG_S)
    outgoing = await source.connect(target.address, secret, SIZE, LONG_S)
    await outgoing.send([(0, bytes(SIZE))], LONG_S)
    for each in sockets:
        each.close()
    await outgoing.close()
    await incoming.close()


async def test_strangers_are_bounded(stage: Stage) -> None:
    """While as many connections as allowed have not named a secret, further ones are closed at once."""
    source, target = await stage.transport(), await stage.transport(max_strangers=2, hello_timeout_s=60.0)
    silent = [await stage.link(source, target.address) for _ in range(5)]
    await eventually(lambda: [event for event, _ in stage.told].count("transport_stranger_turned_away") >= 3)
    assert target.tasks == 2
    for link in silent:
        link.close()
    await eventually(lambda: target.tasks == 0)


async def test_another_version_is_refused(stage: Stage) -> None:
    """A source of another protocol version is told so."""
    source, target = await stage.transport(), await stage.transport()
    link = await stage.link(source, target.address)
    await link.send_frame(Hello(secrets.token_bytes(32), 5, link.inbox, version=9).encode())
    async with asyncio.timeout(LONG_S):
        assert Verdict.decode(await link.receive_frame()).code == OTHER_VERSION
    link.close()


class Forger:
    """A source that was accepted for slots of 4096, 4096 and 100 bytes, and then sends what it likes."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.buffers = [bytearray(SIZE), bytearray(SIZE), bytearray(100)]

    async def begin(self) -> Link:
        """Return its link."""
        source, self.target = await self.stage.transport(), await self.stage.transport()
        secret = secrets.token_bytes(32)
        self.incoming = self.target.offer(secret, self.buffers, LONG_S)
        link = await self.stage.link(source, self.target.address)
        async with asyncio.timeout(LONG_S):
            await link.send_frame(Hello(secret, self.incoming.size_bytes, link.inbox).encode())
            verdict = Verdict.decode(await link.receive_frame())
        assert verdict.code == ACCEPTED
        link.greeted(verdict.tag)
        return link

    async def fails(self, link: Link, error: type[TransportError], code: int) -> None:
        """Check that the target ends the transfer with this error and says so."""
        with pytest.raises(error):
            await self.incoming.receive(LONG_S)
        async with asyncio.timeout(LONG_S):
            assert Answer.decode(await link.receive_frame()).code == code
        link.close()
        await self.incoming.close()


def payload(size: int) -> HostRegion:
    """Return that many bytes."""
    return HostRegion(memoryview(b"\x07" * size))


GOOD = Chunk(0, 1, 0, SIZE, checksum_of(payload(SIZE)))


def group(*chunks: Chunk, number: int = 0, last: bool = True) -> bytes:
    """Return the frame of a group."""
    return Group(number, chunks, last).encode()


async def test_a_corrupted_chunk(stage: Stage) -> None:
    """A chunk whose bytes are not what the checksum says ends the transfer; no round with it is reported."""
    forger = Forger(stage)
    link = await forger.begin()
    assert GOOD.checksum is not None
    await link.post(group(replace(GOOD, checksum=GOOD.checksum ^ 1)), [payload(SIZE)])
    await forger.fails(link, CorruptedError, CORRUPTED)


async def test_damage_between_source_and_target_is_found(stage: Stage) -> None:
    """One bit of one chunk changed after its checksum was taken: source and target both get `CorruptedError`."""
    source, target = await stage.transport(), await stage.transport()
    secret, size = secrets.token_bytes(32), 3 * 2**20
    incoming = target.offer(secret, [bytearray(size)], LONG_S)
    outgoing = await source.connect(target.address, secret, size, LONG_S)
    link, data = outgoing._link, bytearray(size)
    post = link.post

    async def damaging(frame: bytes, payloads: list[HostRegion]) -> None:
        damaged = bytearray(payloads[1].raw)
        damaged[-1] ^= 1
        await post(frame, [payloads[0], HostRegion(memoryview(damaged)), *payloads[2:]])

    link.post = damaging
    with pytest.raises(CorruptedError):
        await outgoing.send([(0, data)], LONG_S)
    with pytest.raises(CorruptedError):
        await incoming.receive(LONG_S)
    await incoming.close()


SENSELESS_CHUNKS = {
    "a slot that was not offered": replace(GOOD, slot=3),
    "more slots than offered": replace(GOOD, slot=1, count=3),
    "no slot": replace(GOOD, count=0),
    "longer than the slot": replace(GOOD, length=SIZE + 1),
    "longer than any chunk": replace(GOOD, length=2**31),
    "not from the beginning": replace(GOOD, offset=1, length=SIZE - 1),
    "no bytes for a slot that has some": replace(GOOD, length=0),
    "packed, with another length": replace(GOOD, slot=1, count=2, length=SIZE),
}


SENSELESS_FRAMES = {
    **{name: group(chunk) for name, chunk in SENSELESS_CHUNKS.items()},
    "out of turn": group(GOOD, number=1),
    "more chunks than fit": group(GOOD)[:2] + bytes([MAX_GROUP + 1]) + group(GOOD)[3:],
    "fewer chunks than it says": group(GOOD)[:2] + bytes([2]) + group(GOOD)[3:],
    "of nothing, and no end": group(last=False),
    "of no kind": b"\x09" * FRAME_BYTES,
    "a greeting again": Hello(bytes(32), SIZE).encode(),
}


@pytest.mark.parametrize("frame", SENSELESS_FRAMES.values(), ids=SENSELESS_FRAMES)
async def test_a_group_that_makes_no_sense(stage: Stage, frame: bytes) -> None:
    """A group with a chunk that does not fit the offer is refused before memory is taken for it."""
    forger = Forger(stage)
    link = await forger.begin()
    tracemalloc.start()
    await link.post(frame, [])
    await forger.fails(link, ProtocolError, SENSELESS)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 2**20
    assert not any(map(any, forger.buffers))


async def test_a_slot_sent_twice(stage: Stage) -> None:
    """Bytes of a slot are accepted once: what was confirmed cannot be changed later."""
    forger = Forger(stage)
    link = await forger.begin()
    await link.post(group(GOOD), [payload(SIZE)])
    assert (await forger.incoming.receive(LONG_S)).slots == (0,)
    async with asyncio.timeout(LONG_S):
        assert Answer.decode(await link.receive_frame()).code == 0
    await link.post(group(GOOD, number=1), [payload(SIZE)])
    await forger.fails(link, ProtocolError, SENSELESS)


async def test_one_chunk_of_a_group_that_makes_no_sense(stage: Stage) -> None:
    """One bad chunk in a group, and none of its bytes is accepted."""
    forger = Forger(stage)
    link = await forger.begin()
    await link.post(group(GOOD, replace(GOOD, slot=1), GOOD), [payload(SIZE)] * 3)
    await forger.fails(link, ProtocolError, SENSELESS)
    assert not any(map(any, forger.buffers))


async def test_a_group_is_missing(stage: Stage) -> None:
    """A round whose end does not follow on the chunks that came ends the transfer."""
    forger = Forger(stage)
    link = await forger.begin()
    await link.post(group(GOOD, last=False), [payload(SIZE)])
    await link.post(group(number=2), [])
    await forger.fails(link, ProtocolError, SENSELESS)


async def test_a_round_in_several_groups(stage: Stage) -> None:
    """A round ends with the group that says so, even if that one is empty."""
    forger = Forger(stage)
    link = await forger.begin()
    await link.post(group(GOOD, last=False), [payload(SIZE)])
    await link.post(group(replace(GOOD, slot=1), number=1, last=False), [payload(SIZE)])
    await link.post(group(number=2), [])
    assert (await forger.incoming.receive(LONG_S)).slots == (0, 1)
    async with asyncio.timeout(LONG_S):
        assert Answer.decode(await link.receive_frame()).code == 0
    link.close()
    await forger.incoming.close()


async def test_a_round_that_ends_in_the_middle_of_a_slot(stage: Stage) -> None:
    """A round is whole slots: one that is only begun is no round."""
    forger = Forger(stage)
    link = await forger.begin()
    half = payload(SIZE // 2)
    await link.post(group(Chunk(0, 1, 0, SIZE // 2, checksum_of(half))), [half])
    await forger.fails(link, ProtocolError, SENSELESS)


async def test_a_truncated_chunk(stage: Stage) -> None:
    """A source that sends fewer bytes than it said and leaves has not finished a round."""
    forger = Forger(stage)
    link = await forger.begin()
    await link.post(group(GOOD), [payload(100)])
    link.close()
    with pytest.raises(LinkLostError):
        await forger.incoming.receive(LONG_S)
    await forger.incoming.close()
