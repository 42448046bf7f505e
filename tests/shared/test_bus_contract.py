import asyncio
from collections.abc import Awaitable, Callable

import pytest

from mell_shared.bus import (
    Bus,
    BusClosedError,
    Delivery,
    InvalidSubjectError,
    NoResponderError,
    PayloadTooLargeError,
    RequestTimeoutError,
)
from tests.shared.conftest import BusHarness, eventually


class Received:
    """A handler that keeps what it gets."""

    def __init__(self) -> None:
        self.deliveries: list[Delivery] = []

    async def __call__(self, delivery: Delivery) -> None:
        """Keep `delivery`."""
        self.deliveries.append(delivery)

    @property
    def data(self) -> list[bytes]:
        """The payloads in the order they came."""
        return [delivery.data for delivery in self.deliveries]


def echo(bus: Bus) -> Callable[[Delivery], Awaitable[None]]:
    """Return a handler that answers with what it was sent."""

    async def answer(delivery: Delivery) -> None:
        await bus.publish(delivery.reply_to, b"re:" + delivery.data)

    return answer


async def test_one_publisher_s_messages_on_a_subject_arrive_once_in_order(harness: BusHarness) -> None:
    """What one bus publishes on one subject arrives complete and in order, without a reply subject."""
    source, target = await harness.connect(), await harness.connect()
    received = Received()
    await target.subscribe("a.b", received)
    sent = [str(number).encode() for number in range(500)]
    for data in sent:
        await source.publish("a.b", data)
    await eventually(lambda: len(received.data) == len(sent))
    assert received.data == sent
    assert received.deliveries[0] == Delivery("a.b", b"0", "")


async def test_a_bus_hears_itself_and_every_subscriber_gets_a_copy(harness: BusHarness) -> None:
    """Without a queue group each subscription gets every message, the publisher's own too."""
    first, second = await harness.connect(), await harness.connect()
    copies = [Received(), Received(), Received()]
    for bus, received in zip((first, first, second), copies, strict=True):
        await bus.subscribe("news", received)
    await first.publish("news", b"x")
    await eventually(lambda: all(received.data == [b"x"] for received in copies))


async def test_a_queue_group_shares_messages(harness: BusHarness) -> None:
    """Each message goes to exactly one member of a group, and to every plain subscription beside it."""
    source = await harness.connect()
    members, alone = [Received(), Received(), Received()], Received()
    for member in members:
        await (await harness.connect()).subscribe("work", member, queue="workers")
    await (await harness.connect()).subscribe("work", alone)
    sent = [str(number).encode() for number in range(300)]
    for data in sent:
        await source.publish("work", data)
    await eventually(lambda: len(alone.data) == 300 and sum(len(member.data) for member in members) == 300)
    assert sorted(data for member in members for data in member.data) == sorted(sent)
    assert all(member.data for member in members)


async def test_wildcards_match_as_in_nats(harness: BusHarness) -> None:
    """`*` stands for one token, a final `>` for one or more."""
    bus = await harness.connect()
    star, rest = Received(), Received()
    await bus.subscribe("w.*.c", star)
    await bus.subscribe("w.>", rest)
    for subject in ("w", "w.a.c", "w.a.b", "w.a.b.c", "w.c", "other.a.c"):
        await bus.publish(subject, subject.encode())
    await eventually(lambda: len(rest.data) == 4 and len(star.data) == 1)
    assert star.data == [b"w.a.c"]
    assert sorted(rest.data) == [b"w.a.b", b"w.a.b.c", b"w.a.c", b"w.c"]


async def test_replies_find_their_requests(harness: BusHarness) -> None:
    """Many requests at once each get their own reply."""
    asking, answering = await harness.connect(), await harness.connect()
    await answering.subscribe("echo", echo(answering))
    sent = [str(number).encode() for number in range(100)]
    replies = await asyncio.gather(*(asking.request("echo", data, 60.0) for data in sent))
    assert replies == [b"re:" + data for data in sent]


async def test_a_request_without_a_reply_times_out(harness: BusHarness) -> None:
    """A silent receiver costs the time-out and a clear error; its late reply disturbs nothing."""
    asking, answering = await harness.connect(), await harness.connect()
    received = Received()
    await answering.subscribe("slow", received)
    with pytest.raises(RequestTimeoutError, match=r"slow within 0\.05 s"):
        await asking.request("slow", b"1", 0.05)
    await eventually(lambda: bool(received.deliveries))
    await answering.publish(received.deliveries[0].reply_to, b"late")
    await answering.subscribe("echo", echo(answering))
    assert await asking.request("echo", b"2", 60.0) == b"re:2"


async def test_a_request_to_nobody_fails_at_once(harness: BusHarness) -> None:
    """No subscription means `NoResponderError` long before the time-out, also after the last one has gone."""
    asking, answering = await harness.connect(), await harness.connect()
    with pytest.raises(NoResponderError, match="nobody"):
        await asking.request("nobody", b"", 60.0)
    subscription = await answering.subscribe("nobody", echo(answering))
    assert await asking.request("nobody", b"", 60.0) == b"re:"
    await subscription.unsubscribe()
    await answering.flush()
    with pytest.raises(NoResponderError):
        await asking.request("nobody", b"", 60.0)


async def test_unsubscribing_ends_deliveries(harness: BusHarness) -> None:
    """After `unsubscribe` nothing arrives; repeating it, or doing it on a closed bus, is harmless."""
    bus = await harness.connect()
    received, still = Received(), Received()
    subscription = await bus.subscribe("s", received)
    await bus.subscribe("s", still)
    await bus.publish("s", b"1")
    await eventually(lambda: received.data == [b"1"])
    await subscription.unsubscribe()
    await subscription.unsubscribe()
    await bus.publish("s", b"2")
    await eventually(lambda: still.data == [b"1", b"2"])
    assert received.data == [b"1"]
    await bus.close()
    await subscription.unsubscribe()


async def test_a_handler_may_unsubscribe_itself(harness: BusHarness) -> None:
    """A subscription that ends itself gets one delivery, and its handler runs to its end."""
    bus = await harness.connect()
    finished: list[bytes] = []

    async def once(delivery: Delivery) -> None:
        await subscription.unsubscribe()
        await asyncio.sleep(0)
        finished.append(delivery.data)

    subscription = await bus.subscribe("once", once)
    for _ in range(3):
        await bus.publish("once", b"x")
    await eventually(lambda: bool(finished))
    await bus.flush()
    assert finished == [b"x"]


async def test_a_closed_bus_refuses_everything(harness: BusHarness) -> None:
    """After `close` every call says so, `watch` has returned, and closing again is harmless."""
    bus = await harness.connect()
    watching = asyncio.create_task(bus.watch())
    await bus.close()
    await bus.close()
    await asyncio.wait_for(watching, 60)
    assert not bus.connected
    for attempt in (
        bus.publish("x", b""),
        bus.request("x", b"", 1.0),
        bus.subscribe("x", Received()),
        bus.flush(),
    ):
        with pytest.raises(BusClosedError):
            await attempt


async def test_what_was_published_before_closing_arrives(harness: BusHarness) -> None:
    """`close` sends what `publish` accepted."""
    source, target = await harness.connect(), await harness.connect()
    received = Received()
    await target.subscribe("last", received)
    for _ in range(50):
        await source.publish("last", b"words")
    await source.close()
    await eventually(lambda: len(received.data) == 50)


async def test_an_oversized_message_is_refused_by_name_and_harms_nothing(harness: BusHarness) -> None:
    """Over `max_payload` publish and request raise with both sizes; exactly at the limit they work."""
    bus = await harness.connect()
    received = Received()
    await bus.subscribe("big", received)
    too_large = bytes(bus.max_payload + 1)
    for attempt in (bus.publish("big", too_large), bus.request("big", too_large, 1.0)):
        with pytest.raises(PayloadTooLargeError, match=f"{len(too_large)} bytes.*{bus.max_payload}"):
            await attempt
    await bus.publish("big", bytes(bus.max_payload))
    await eventually(lambda: len(received.data) == 1)
    assert len(received.data[0]) == bus.max_payload


@pytest.mark.parametrize("subject", ["", ".", "a.", ".a", "a..b", "a b", "a\r\nPUB x 0", "a.*", ">", "a.>", "ü \t"])
async def test_a_bad_subject_is_refused_on_publishing(harness: BusHarness, subject: str) -> None:
    """What is no subject (ids of peers are in it) is refused before it reaches the broker."""
    bus = await harness.connect()
    for attempt in (bus.publish(subject, b""), bus.request(subject, b"", 1.0)):
        with pytest.raises(InvalidSubjectError, match="no subject"):
            await attempt
    assert bus.connected


@pytest.mark.parametrize("pattern", ["", ".", "a..b", "a b", ">.a", "a.>.b", "a*", "a.b>", "**"])
async def test_a_bad_pattern_is_refused_on_subscribing(harness: BusHarness, pattern: str) -> None:
    """What is no pattern is refused before it reaches the broker."""
    bus = await harness.connect()
    with pytest.raises(InvalidSubjectError, match="no subject"):
        await bus.subscribe(pattern, Received())
    assert bus.connected


async def test_a_slow_consumer_is_bounded_and_counted(harness: BusHarness) -> None:
    """A handler that stands still has at most `max_pending` deliveries waiting; the others are dropped and counted."""
    source, target = await harness.connect(), await harness.connect()
    go, received = asyncio.Event(), Received()

    async def slow(delivery: Delivery) -> None:
        await go.wait()
        await received(delivery)

    await target.subscribe("fast", slow, max_pending=10)
    for number in range(200):
        await source.publish("fast", str(number).encode())
    await source.flush()
    await eventually(lambda: target.stats.dropped >= 189)
    go.set()
    await eventually(lambda: len(received.data) + target.stats.dropped == 200)
    assert len(received.data) in (10, 11)  # the waiting ones, and the one in the handler's hands
    assert received.data[:10] == [str(number).encode() for number in range(10)]


async def test_deliveries_of_a_subscription_do_not_overlap(harness: BusHarness) -> None:
    """The next delivery waits until the handler has returned, while other subscriptions go on."""
    bus = await harness.connect()
    go, begun, other = asyncio.Event(), Received(), Received()

    async def waits(delivery: Delivery) -> None:
        await begun(delivery)
        await go.wait()

    await bus.subscribe("one", waits)
    await bus.subscribe("two", other)
    for data in (b"1", b"2"):
        await bus.publish("one", data)
        await bus.publish("two", data)
    await eventually(lambda: other.data == [b"1", b"2"])
    assert begun.data == [b"1"]
    go.set()
    await eventually(lambda: begun.data == [b"1", b"2"])


async def test_a_failing_handler_reaches_the_watcher(harness: BusHarness) -> None:
    """A handler's exception leaves `watch`, and the bus takes no more work."""
    bus = await harness.connect()

    async def broken(delivery: Delivery) -> None:
        raise ZeroDivisionError(delivery.data.decode())

    await bus.subscribe("bug", broken)
    watching = asyncio.create_task(bus.watch())
    await bus.publish("bug", b"first")
    with pytest.raises(ZeroDivisionError, match="first"):
        await asyncio.wait_for(watching, 60)
    assert not bus.connected
    with pytest.raises(BusClosedError):
        await bus.publish("bug", b"second")
    await bus.close()


async def test_a_failure_nobody_watched_leaves_close(harness: BusHarness) -> None:
    """Without a watcher the handler's exception is raised by `close`, once."""
    bus = await harness.connect()

    async def broken(_delivery: Delivery) -> None:
        raise ZeroDivisionError

    await bus.subscribe("bug", broken)
    await bus.publish("bug", b"")
    await eventually(lambda: not bus.connected)
    with pytest.raises(ZeroDivisionError):
        await bus.close()
    await bus.close()


async def test_a_watcher_that_left_before_the_failure_was_not_told(harness: BusHarness) -> None:
    """A failure during the service's stop, when nobody watches any more, is not lost."""
    bus = await harness.connect()

    async def broken(_delivery: Delivery) -> None:
        raise ZeroDivisionError

    await bus.subscribe("bug", broken)
    watching = asyncio.create_task(bus.watch())
    await asyncio.sleep(0)
    watching.cancel()
    await bus.publish("bug", b"")
    await eventually(lambda: not bus.connected)
    with pytest.raises(ZeroDivisionError):
        await bus.close()
    assert watching.cancelled()


async def test_the_bus_survives_its_broker(harness: BusHarness) -> None:
    """While the broker is away nothing is sent or kept; afterwards the callback runs and subscriptions work again."""
    source, target = await harness.connect(), await harness.connect()
    received, back = Received(), asyncio.Event()
    await target.subscribe("s", received)
    await target.subscribe("echo", echo(target))
    source.on_reconnect(back.set)
    await source.publish("s", b"before")
    await eventually(lambda: received.data == [b"before"])
    await harness.cut()
    assert not source.connected
    for attempt in (
        source.publish("s", b"while down"),
        source.request("echo", b"while down", 1.0),
        source.subscribe("s", received),
        source.flush(),
    ):
        with pytest.raises(BusClosedError, match="down"):
            await attempt
    await harness.restore()
    await asyncio.wait_for(back.wait(), 60)
    await eventually(lambda: target.connected and target.stats.reconnections >= 1)
    await target.flush()  # the broker knows of its subscriptions again
    await source.publish("s", b"after")
    assert await source.request("echo", b"?", 60.0) == b"re:?"
    await eventually(lambda: received.data == [b"before", b"after"])
    assert source.stats.reconnections >= 1


async def test_a_failing_reconnection_callback_reaches_the_watcher(harness: BusHarness) -> None:
    """A bug in a callback is noticed as one in a handler is."""
    bus = await harness.connect()

    def broken() -> None:
        raise ZeroDivisionError

    bus.on_reconnect(broken)
    watching = asyncio.create_task(bus.watch())
    await harness.cut()
    await harness.restore()
    with pytest.raises(ZeroDivisionError):
        await asyncio.wait_for(watching, 60)
    await bus.close()


async def test_a_request_cut_in_the_middle_times_out(harness: BusHarness) -> None:
    """A reply lost with the broker ends in the time-out, not in a hang."""
    asking, answering = await harness.connect(), await harness.connect()
    received = Received()
    await answering.subscribe("slow", received)
    asked = asyncio.create_task(asking.request("slow", b"", 0.3))
    await eventually(lambda: len(received.data) == 1)
    await harness.cut()
    with pytest.raises(RequestTimeoutError):
        await asked
    await harness.restore()
