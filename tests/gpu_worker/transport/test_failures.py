import asyncio
import secrets
from contextlib import suppress

import pytest

from mell_gpu_worker.transport.base import DeadlineError, LinkLostError, RefusedError, Round, TransportError
from tests.gpu_worker.transport.peer import LONG_S, pattern
from tests.gpu_worker.transport.stage import OtherWorker, Stage, descriptors, eventually

MIB = 2**20
SLOTS = 48
SIZES = (MIB,) * SLOTS


async def moves(stage: Stage) -> None:
    """Check that a transfer between two fresh workers of the stage works."""
    source, target = await stage.transport(), await stage.transport()
    secret, buffer = secrets.token_bytes(32), bytearray(MIB + 1)
    incoming = target.offer(secret, [buffer], LONG_S)
    outgoing = await source.connect(target.address, secret, MIB + 1, LONG_S)
    await outgoing.send([(0, pattern(0, MIB + 1))], LONG_S)
    assert buffer == pattern(0, MIB + 1)
    await outgoing.close()
    await incoming.close()


class Arriving:
    """A large transfer from another worker to us, of which some slots have arrived and others cannot have."""

    def __init__(self, stage: Stage, lifetime_s: float = LONG_S) -> None:
        self.stage = stage
        self.lifetime_s = lifetime_s
        self.buffers = [bytearray(size) for size in SIZES]
        self.secret = secrets.token_bytes(32)

    async def begin(self) -> OtherWorker:
        """Return the source, in mid-transfer."""
        self.target = await self.stage.transport()
        other = await self.stage.other()
        await other.ask(fill=SIZES)  # which takes a while, before the offer's lifetime begins
        self.incoming = self.target.offer(self.secret, self.buffers, self.lifetime_s)
        assert "connected" in await other.ask(connect=self.target.address, secret=self.secret.hex())
        self.sending = asyncio.create_task(other.ask(send=list(range(SLOTS))))
        async with asyncio.timeout(LONG_S):
            while not self.buffers[1][-1] and not self.buffers[1][-2]:  # noqa: ASYNC110 - a chunk sets no event
                await asyncio.sleep(0)
        assert not any(self.buffers[-1])
        return other

    async def given_back(self, other: OtherWorker) -> None:
        """Close, let the source go on if it can, and check that it writes nothing more."""
        await self.incoming.close()
        for buffer in self.buffers:
            buffer[:] = b"\xee" * MIB
        other.go_on()
        answer = await asyncio.wait_for(self.sending, LONG_S)
        assert "error" in answer
        await asyncio.sleep(0.2)
        assert all(buffer == b"\xee" * MIB for buffer in self.buffers)


async def test_a_source_killed_in_mid_transfer(stage: Stage) -> None:
    """A source that dies ends the transfer at once; the buffers are ours again, and the worker goes on."""
    arriving = Arriving(stage)
    other = await arriving.begin()
    other.kill()
    with pytest.raises(LinkLostError):
        await arriving.incoming.receive(LONG_S)
    await arriving.incoming.close()
    assert "error" in await asyncio.wait_for(arriving.sending, LONG_S)
    await moves(stage)


async def test_a_source_stopped_in_mid_transfer(stage: Stage) -> None:
    """A source that stands still costs the deadline; when it goes on it cannot write into memory given back."""
    arriving = Arriving(stage)
    other = await arriving.begin()
    await other.stop()
    with pytest.raises(DeadlineError):
        await arriving.incoming.receive(0.2)
    with pytest.raises(DeadlineError):
        await arriving.incoming.receive(0.2)
    await arriving.given_back(other)
    await moves(stage)


async def test_the_target_closes_in_mid_transfer(stage: Stage) -> None:
    """A target that closes takes its buffers back in the middle of a chunk; the source hears of it."""
    arriving = Arriving(stage)
    other = await arriving.begin()
    await arriving.given_back(other)
    await moves(stage)


async def test_an_offer_nobody_takes_ends_with_its_lifetime(stage: Stage) -> None:
    """Past its lifetime an offer is over, whether or not somebody waits for a round; who comes late is refused."""
    source, target = await stage.transport(), await stage.transport()
    secret = secrets.token_bytes(32)
    incoming = target.offer(secret, [bytearray(5)], 0.1)
    with pytest.raises(DeadlineError, match="lifetime"):
        await incoming.receive(LONG_S)
    with pytest.raises(RefusedError, match="no offer"):
        await source.connect(target.address, secret, 5, LONG_S)


async def test_an_offer_s_lifetime_ends_a_transfer_under_way(stage: Stage) -> None:
    """A source that stands still past the offer's lifetime loses it, though nobody waits for a round."""
    arriving = Arriving(stage, lifetime_s=5.0)
    other = await arriving.begin()
    await other.stop()
    async with asyncio.timeout(LONG_S):
        while arriving.target.tasks:  # noqa: ASYNC110 - what is waited for sets no event
            await asyncio.sleep(0.02)
    with pytest.raises(DeadlineError, match="lifetime"):
        await arriving.incoming.receive(LONG_S)
    await arriving.given_back(other)


class Leaving:
    """A transfer from us to another worker that has begun."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.secret = secrets.token_bytes(32)
        self.sent = [(slot, bytes(MIB)) for slot in range(SLOTS)]

    async def begin(self) -> OtherWorker:
        """Return the target, connected and served once."""
        self.source = await self.stage.transport()
        other = await self.stage.other()
        await other.ask(offer=self.secret.hex(), sizes=SIZES)
        self.outgoing = await self.source.connect(other.address, self.secret, sum(SIZES), LONG_S)
        await self.outgoing.send(self.sent[:1], LONG_S)
        return other

    async def under_way(self, other: OtherWorker) -> "asyncio.Task[Round]":
        """Return a round in mid-transfer: its target stands still, so it cannot end however fast the link is."""
        await other.stop()
        sending = asyncio.create_task(self.outgoing.send(self.sent[1:], LONG_S))
        await asyncio.sleep(0.005)
        assert not sending.done()
        return sending


async def test_a_target_killed_in_mid_transfer(stage: Stage) -> None:
    """A target that dies fails the round at once, and every later one."""
    leaving = Leaving(stage)
    other = await leaving.begin()
    sending = await leaving.under_way(other)
    other.kill()
    with pytest.raises(LinkLostError):
        await sending
    with pytest.raises(LinkLostError):
        await leaving.outgoing.send(leaving.sent[1:2], LONG_S)
    await leaving.outgoing.close()
    await moves(stage)


async def test_a_target_stopped_in_mid_transfer(stage: Stage) -> None:
    """A target that stands still costs the deadline; when it goes on it finds the link lost, and lives."""
    leaving = Leaving(stage)
    other = await leaving.begin()
    await other.stop()
    with pytest.raises(DeadlineError):
        await leaving.outgoing.send(leaving.sent[1:], 0.3)
    other.go_on()
    assert (await other.ask(receive=True))["slots"] == [0]
    assert (await other.ask(receive=True))["error"] == "LinkLostError"
    await leaving.outgoing.close()
    secret = secrets.token_bytes(32)
    await other.ask(offer=secret.hex(), sizes=[5])
    if stage.kind != "memory":  # whose links are not made anew for a peer that stood still
        again = await leaving.source.connect(other.address, secret, 5, LONG_S)
        await again.send([(0, b"alive")], LONG_S)
        await again.close()


async def test_a_send_cancelled_in_mid_transfer(stage: Stage) -> None:
    """A cancelled round ends the transfer on both sides; neither worker is harmed."""
    leaving = Leaving(stage)
    other = await leaving.begin()
    assert (await other.ask(receive=True))["slots"] == [0]
    sending = await leaving.under_way(other)
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending
    other.go_on()
    with pytest.raises(LinkLostError, match="cancelled"):
        await leaving.outgoing.send(leaving.sent[1:2], LONG_S)
    assert (await other.ask(receive=True))["error"] == "LinkLostError"


async def test_a_receive_cancelled(stage: Stage) -> None:
    """Cancelling the wait for a round ends the transfer."""
    arriving = Arriving(stage)
    other = await arriving.begin()
    waiting = asyncio.create_task(arriving.incoming.receive(LONG_S))
    await asyncio.sleep(0)
    waiting.cancel()
    with suppress(asyncio.CancelledError):
        await waiting
    with pytest.raises(TransportError):
        await arriving.incoming.receive(LONG_S)
    await arriving.given_back(other)


async def test_closing_the_transport_ends_all_it_has(stage: Stage) -> None:
    """Closing a worker's transport ends its transfers both ways, mid-round, and its offers."""
    leaving = Leaving(stage)
    sending = await leaving.under_way(await leaving.begin())
    await leaving.source.close()
    with pytest.raises(LinkLostError):
        await sending
    arriving = Arriving(stage)
    await arriving.begin()
    await arriving.target.close()
    with pytest.raises(LinkLostError):
        await arriving.incoming.receive(LONG_S)
    assert "error" in await asyncio.wait_for(arriving.sending, LONG_S)


async def test_aborts_leave_nothing_in_a_living_worker(stage: Stage) -> None:
    """Transfers cancelled or closed half-way, many times over, leave no descriptor, task or request behind."""
    source, target = await stage.transport(), await stage.transport()
    buffers = [bytearray(MIB) for _ in range(16)]

    async def abort(number: int) -> None:
        secret = secrets.token_bytes(32)
        incoming = target.offer(secret, buffers, LONG_S)
        outgoing = await source.connect(target.address, secret, incoming.size_bytes, LONG_S)
        sending = asyncio.create_task(outgoing.send(list(enumerate(buffers)), LONG_S))
        await asyncio.sleep(0.001)
        if number % 2:
            sending.cancel()
        else:
            await incoming.close()
        with suppress(TransportError, asyncio.CancelledError):
            await sending
        await outgoing.close()
        await incoming.close()

    await abort(0)
    await abort(1)
    before = descriptors()
    for number in range(12):
        await abort(number)
    await eventually(lambda: descriptors() <= before)
    await eventually(lambda: target.tasks == 0 and getattr(target, "pending", 0) == 0)


async def test_nobody_there(stage: Stage) -> None:
    """Connecting to an address where nobody listens fails, as does one of another transport."""
    source, gone = await stage.transport(), await stage.transport()
    address = gone.address
    await gone.close()
    with pytest.raises(TransportError):
        await source.connect(address, secrets.token_bytes(32), 5, LONG_S)
    with pytest.raises(TransportError, match="one transport"):
        await source.connect("other://127.0.0.1:5", secrets.token_bytes(32), 5, 5.0)


async def test_connecting_to_a_stopped_worker(stage: Stage) -> None:
    """A worker that stands still does not answer the greeting; the deadline ends the attempt."""
    source, other = await stage.transport(), await stage.other()
    secret = secrets.token_bytes(32)
    await other.ask(offer=secret.hex(), sizes=[5])
    if stage.kind == "memory":
        (await stage.link(source, other.address)).close()
    await other.stop()
    if stage.kind != "memory":  # where a link that stands still is one that exists
        with pytest.raises(DeadlineError):
            await source.connect(other.address, secret, 5, 0.3)
    other.go_on()
