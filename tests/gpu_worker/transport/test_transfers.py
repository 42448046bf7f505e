import asyncio
import secrets
import socket
from collections import Counter

import pytest

from mell_gpu_worker.transport import checksum
from mell_gpu_worker.transport import outgoing as sending_end
from mell_gpu_worker.transport.base import LinkLostError, Round
from mell_gpu_worker.transport.regions import Region, region_of
from mell_gpu_worker.transport.tcp import TcpLink
from tests.gpu_worker.transport.peer import LONG_S, pattern
from tests.gpu_worker.transport.stage import Stage

MIB = 2**20
ODD = (MIB, 737_280, 3 * MIB + 1, 5, 0, 1000, 77, 0, 300_001, MIB - 1)


async def test_rounds_arrive_in_place_and_in_order(stage: Stage) -> None:
    """Buffers of every size, none and odd ones too, arrive bit for bit, round by round; slots not sent stay."""
    source, target = await stage.transport(), await stage.transport()
    buffers = [bytearray(size) for size in ODD]
    sent = [pattern(slot, size) for slot, size in enumerate(ODD)]
    secret = secrets.token_bytes(32)
    incoming = target.offer(secret, buffers, LONG_S)
    outgoing = await source.connect(target.address, secret, incoming.size_bytes, LONG_S)
    for slots in ((2, 0), (), (3, 4, 5, 6), (9, 8)):
        confirmed = await outgoing.send([(slot, sent[slot]) for slot in slots], LONG_S)
        arrived = await incoming.receive(LONG_S)
        size_bytes = sum(ODD[slot] for slot in slots)
        assert (sorted(arrived.slots), arrived.size_bytes) == (sorted(slots), size_bytes)
        assert (confirmed.slots, confirmed.size_bytes, confirmed.unchecked_bytes) == (slots, size_bytes, 0)
    assert [slot for slot, buffer in enumerate(buffers) if buffer == sent[slot]] == [0, 2, 3, 4, 5, 6, 7, 8, 9]
    assert not any(buffers[1])
    await outgoing.close()
    await incoming.close()


async def test_only_small_buffers_are_copied(stage: Stage) -> None:
    """Buffers of a quarter of a chunk and more travel from and into their memory; smaller ones are packed."""
    source, target = await stage.transport(), await stage.transport()
    sizes = (4096,) * 8 + (MIB // 4,) * 3 + (3 * MIB,)
    buffers = [bytearray(size) for size in sizes]
    secret = secrets.token_bytes(32)
    incoming = target.offer(secret, buffers, LONG_S)
    outgoing = await source.connect(target.address, secret, incoming.size_bytes, LONG_S)
    confirmed = await outgoing.send([(slot, pattern(slot, size)) for slot, size in enumerate(sizes)], LONG_S)
    assert confirmed.staged_bytes == (await incoming.receive(LONG_S)).staged_bytes == 8 * 4096
    assert buffers == [pattern(slot, size) for slot, size in enumerate(sizes)]
    await outgoing.close()
    await incoming.close()


async def test_others_get_their_turn_between_chunks(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker's tokens go out while it sends, however fast the target takes what comes."""
    chunk, chunks = 4096, 64
    source, other = await stage.transport(chunk_bytes=chunk), await stage.other()
    secret = secrets.token_bytes(32)
    offered = await other.ask(offer=secret.hex(), sizes=(chunk,) * chunks)
    outgoing = await source.connect(other.address, secret, offered["size_bytes"], LONG_S)
    turn, checksum_of = 0, checksum.checksum_of
    read: Counter[int] = Counter()

    def counted(region: Region) -> int | None:
        read[turn] += 1
        return checksum_of(region)

    monkeypatch.setattr(sending_end, "checksum_of", counted)
    sending = asyncio.ensure_future(outgoing.send([(n, pattern(n, chunk)) for n in range(chunks)], LONG_S))
    while not sending.done():
        turn += 1
        await asyncio.sleep(0)
    assert read.total() == chunks
    assert max(read.values()) <= 2
    await outgoing.close()


async def test_others_get_their_turn_between_the_payloads_of_a_group() -> None:
    """Where handing a payload over is a copy, as it is with TCP, others get a turn after each."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        theirs = socket.create_connection(listening.getsockname())
        link, payload = TcpLink(listening.accept()[0]), region_of(bytes(100), writable=False)
    posting = asyncio.ensure_future(link.post(b"frame", [payload] * 15))
    turns = 0
    while not posting.done():
        turns += 1
        await asyncio.sleep(0)
    assert turns >= 14
    link.close()
    with theirs, theirs.makefile("rb") as sent:
        assert sent.read() == b"frame" + bytes(15 * 100)


async def test_a_whole_transfer_to_another_worker(stage: Stage) -> None:
    """What we send arrives at a peer in another process, whose rounds say so."""
    source, other = await stage.transport(), await stage.other()
    secret = secrets.token_bytes(32)
    offered = await other.ask(offer=secret.hex(), sizes=ODD)
    outgoing = await source.connect(other.address, secret, offered["size_bytes"], LONG_S)
    await outgoing.send([(slot, pattern(slot, size)) for slot, size in enumerate(ODD)], LONG_S)
    assert sorted((await other.ask(receive=True))["slots"]) == list(range(len(ODD)))
    assert all((await other.ask(contents=True))["right"])
    await outgoing.close()
    assert (await other.ask(receive=True))["error"] == "LinkLostError"


async def test_a_whole_transfer_from_another_worker(stage: Stage) -> None:
    """What a peer in another process sends arrives here."""
    target, other = await stage.transport(), await stage.other()
    secret = secrets.token_bytes(32)
    buffers = [bytearray(size) for size in ODD]
    incoming = target.offer(secret, buffers, LONG_S)
    assert not incoming.connected
    await other.ask(fill=ODD)
    assert await other.ask(connect=target.address, secret=secret.hex()) == {"connected": True}
    assert incoming.connected
    assert await other.ask(send=list(range(len(ODD)))) == {"size_bytes": sum(ODD)}
    assert (await incoming.receive(LONG_S)).size_bytes == sum(ODD)
    assert buffers == [pattern(slot, size) for slot, size in enumerate(ODD)]
    await incoming.close()


async def test_several_transfers_at_once_in_both_directions(stage: Stage) -> None:
    """Transfers between the same two workers do not disturb each other, whichever way they go."""
    here, there = await stage.transport(), await stage.transport()

    async def move(source_first: bool, number: int) -> bool:
        source, target = (here, there) if source_first else (there, here)
        buffers = [bytearray(size) for size in ODD]
        sent = [pattern(100 * number + slot, size) for slot, size in enumerate(ODD)]
        secret = secrets.token_bytes(32)
        incoming = target.offer(secret, buffers, LONG_S)
        outgoing = await source.connect(target.address, secret, incoming.size_bytes, LONG_S)
        for half in (slice(0, 4), slice(4, None)):
            await outgoing.send(list(enumerate(sent))[half], LONG_S)
            await incoming.receive(LONG_S)
        await outgoing.close()
        await incoming.close()
        return buffers == sent

    assert all(await asyncio.gather(*(move(bool(number % 2), number) for number in range(6))))


async def test_unfit_buffers_are_refused_before_anything_is_sent(stage: Stage) -> None:
    """A buffer with gaps or a read-only target raises at once; the transfer goes on with a fit one."""
    source, target = await stage.transport(), await stage.transport()
    secret = secrets.token_bytes(32)
    with pytest.raises(ValueError, match="read-only"):
        target.offer(secret, [b"fixed"], LONG_S)
    with pytest.raises(ValueError, match="not contiguous"):
        target.offer(secret, [memoryview(bytearray(10))[::2]], LONG_S)
    with pytest.raises(ValueError, match="neither a buffer"):
        target.offer(secret, ["text"], LONG_S)
    with pytest.raises(ValueError, match="secret"):
        target.offer(b"short", [bytearray(1)], LONG_S)
    buffer = bytearray(5)
    incoming = target.offer(secret, [buffer], LONG_S)
    outgoing = await source.connect(target.address, secret, 5, LONG_S)
    with pytest.raises(ValueError, match="not contiguous"):
        await outgoing.send([(0, memoryview(bytes(10))[::2])], LONG_S)
    assert await outgoing.send([(0, b"fixed")], LONG_S) == Round((0,), 5, staged_bytes=0)
    assert (await incoming.receive(LONG_S)).slots == (0,)
    assert buffer == b"fixed"
    await outgoing.close()
    await incoming.close()


async def test_closing_tells_the_other_side(stage: Stage) -> None:
    """When the target closes, the source's next round fails; when the source closes, so does waiting for one."""
    source, target = await stage.transport(), await stage.transport()
    secret = secrets.token_bytes(32)
    incoming = target.offer(secret, [bytearray(MIB)], LONG_S)
    outgoing = await source.connect(target.address, secret, MIB, LONG_S)
    await incoming.close()
    with pytest.raises(LinkLostError):
        await outgoing.send([(0, bytes(MIB))], LONG_S)
    with pytest.raises(LinkLostError):
        await outgoing.send([(0, bytes(MIB))], LONG_S)
    with pytest.raises(LinkLostError, match="closed here"):
        await incoming.receive(LONG_S)
    incoming = target.offer(secret, [bytearray(MIB)], LONG_S)
    outgoing = await source.connect(target.address, secret, MIB, LONG_S)
    await outgoing.close()
    with pytest.raises(LinkLostError):
        await incoming.receive(LONG_S)
    await incoming.close()
    await incoming.close()
