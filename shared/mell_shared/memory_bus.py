"""A broker inside one process, for tests and simulation: NATS's promises and no more, with seeded misfortune.

Order holds within one subject and publisher; across them a seed picks it. Time is the running loop's, so that under
`mell_shared.testing.VirtualTimeLoop` delays cost nothing and the same seed gives the same run.
"""

import asyncio
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from mell_shared.bus import (
    BusClosedError,
    BusStats,
    Delivery,
    Handler,
    NoResponderError,
    PayloadTooLargeError,
    RequestTimeoutError,
)
from mell_shared.deliveries import Consumer, Deliveries
from mell_shared.subjects import check_pattern, check_subject


@dataclass(frozen=True, slots=True)
class Faults:
    """What happens to each delivery: lost, delivered again later, delayed by up to `max_delay_us`."""

    loss: float = 0.0
    duplicate: float = 0.0
    min_delay_us: int = 0
    max_delay_us: int = 0


NO_FAULTS = Faults()


@dataclass(slots=True, eq=False)
class _Interest:
    """One subscription as the broker sees it."""

    bus: "MemoryBus"
    number: int
    pattern: tuple[str, ...]
    queue: str
    consumer: Consumer


_Lane = tuple[int, str, int]
"""Publisher, subject, receiver: what keeps its order."""


class MemoryBroker:
    """Joins the buses of one process. `faults` may be changed while it runs.

    A request that nobody listens for is answered so at once, as NATS does.
    """

    def __init__(self, *, seed: int = 0, faults: Faults = NO_FAULTS, max_payload: int = 8 * 2**20) -> None:
        self.faults = faults
        self.max_payload = max_payload
        self._random = random.Random(seed)  # noqa: S311 - the point is that it repeats
        self._interests: dict[int, _Interest] = {}
        self._lanes: dict[_Lane, deque[tuple[int, Callable[[], None]]]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._armed_us = 0
        self._count = 0

    def connect(self) -> "MemoryBus":
        """Return a new connection; call it inside the running loop."""
        return MemoryBus(self, self.next_number())

    def next_number(self) -> int:
        """Return a number not used before on this broker."""
        self._count += 1
        return self._count

    def add(self, interest: _Interest) -> None:
        """Deliver to `interest` from now on."""
        self._interests[interest.number] = interest

    def remove(self, interest: _Interest) -> None:
        """Deliver nothing more to `interest`."""
        self._interests.pop(interest.number, None)

    def publish(self, publisher: "MemoryBus", delivery: Delivery) -> None:
        """Send `delivery` on its way to all whose interest matches now."""
        receivers = self._receivers(delivery.subject)
        for interest in receivers:
            lane = (publisher.number, delivery.subject, interest.number)
            self._send(lane, partial(self._hand_over, lane, interest, delivery))
        if not receivers and delivery.reply_to:
            refusal = partial(publisher.refuse, delivery)
            self._send((publisher.number, delivery.reply_to, 0), refusal)

    def _receivers(self, subject: str) -> list[_Interest]:
        tokens = tuple(subject.split("."))
        alone: list[_Interest] = []
        groups: dict[str, list[_Interest]] = {}
        for interest in self._interests.values():
            if interest.bus.connected and _matches(interest.pattern, tokens):
                (groups.setdefault(interest.queue, []) if interest.queue else alone).append(interest)
        return alone + [self._random.choice(members) for members in groups.values()]

    def _hand_over(self, lane: _Lane, interest: _Interest, delivery: Delivery) -> None:
        if not interest.bus.connected or interest.number not in self._interests:
            return
        interest.consumer.offer(delivery)
        if self._random.random() < self.faults.duplicate:
            # A late copy keeps no order, else it could only ever follow its original directly.
            copies = (lane[0], lane[1], -self.next_number())
            self._send(copies, partial(interest.consumer.offer, delivery))

    def _send(self, lane: _Lane, arrive: Callable[[], None]) -> None:
        if self._random.random() < self.faults.loss:
            return
        due_us = _loop_now_us() + self._random.randint(self.faults.min_delay_us, self.faults.max_delay_us)
        waiting = self._lanes.setdefault(lane, deque())
        if waiting:
            due_us = max(due_us, waiting[-1][0])
        waiting.append((due_us, arrive))
        self._arm(due_us)

    def _arm(self, due_us: int) -> None:
        if self._timer is not None:
            if self._armed_us <= due_us:
                return
            self._timer.cancel()
        self._armed_us = due_us
        self._timer = asyncio.get_running_loop().call_at(due_us / 1e6, self._deliver_due)

    def _deliver_due(self) -> None:
        self._timer = None
        now_us = _loop_now_us()
        due = [lane for lane, waiting in self._lanes.items() if waiting[0][0] <= now_us]
        while due:
            place = self._random.randrange(len(due))
            waiting = self._lanes[due[place]]
            _, arrive = waiting.popleft()
            if not waiting:
                del self._lanes[due[place]]
            if not waiting or waiting[0][0] > now_us:
                del due[place]
            arrive()
        if self._lanes:
            self._arm(min(waiting[0][0] for waiting in self._lanes.values()))


class MemoryBus:
    """A `Bus` on a `MemoryBroker`; `disconnect` and `reconnect` play the broker's loss and return."""

    def __init__(self, broker: MemoryBroker, number: int) -> None:
        self.number = number
        self._broker = broker
        self._connected = True
        self._deliveries = Deliveries()
        self._interests: list[_Interest] = []
        self._replies: dict[str, asyncio.Future[bytes]] = {}
        self._inbox = f"_INBOX.{number}"
        self._subscribe(f"{self._inbox}.*", self._replied, "", 65_536)

    @property
    def connected(self) -> bool:
        """Whether the connection is up now."""
        return self._connected and not self._deliveries.ended

    @property
    def max_payload(self) -> int:
        """The largest message the broker takes, in bytes."""
        return self._broker.max_payload

    @property
    def stats(self) -> BusStats:
        """Counts since start."""
        return self._deliveries.stats

    async def watch(self) -> None:
        """Return when the bus is closed; raise what a handler raised."""
        await self._deliveries.watch()

    def on_reconnect(self, callback: Callable[[], None]) -> None:
        """Call `callback` after each `reconnect`."""
        self._deliveries.on_reconnect(callback)

    def disconnect(self) -> None:
        """Lose the connection: nothing is sent or delivered until `reconnect`."""
        self._connected = False

    def reconnect(self) -> None:
        """Have the connection again, with all subscriptions."""
        assert not self._connected, "reconnect follows disconnect"
        self._connected = True
        self._deliveries.reconnected()

    async def publish(self, subject: str, data: bytes, reply_to: str = "") -> None:
        """Send and forget; raises as `Bus.publish` does."""
        self._check_connected()
        check_subject(subject)
        if len(data) > self.max_payload:
            raise PayloadTooLargeError(len(data), self.max_payload)
        self._broker.publish(self, Delivery(subject, data, reply_to))

    async def request(self, subject: str, data: bytes, timeout_s: float) -> bytes:
        """Send and wait for one reply; raises as `Bus.request` does."""
        inbox = f"{self._inbox}.{self._broker.next_number()}"
        reply: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._replies[inbox] = reply
        try:
            await self.publish(subject, data, inbox)
            async with asyncio.timeout(timeout_s):
                return await reply
        except TimeoutError as error:
            raise RequestTimeoutError(f"no reply on {subject} within {timeout_s} s") from error
        finally:
            del self._replies[inbox]

    async def subscribe(
        self, subject: str, handler: Handler, *, queue: str = "", max_pending: int = 65_536
    ) -> "_MemorySubscription":
        """Deliver `subject` to `handler`; raises as `Bus.subscribe` does."""
        self._check_connected()
        check_pattern(subject)
        return _MemorySubscription(self._broker, self._subscribe(subject, handler, queue, max_pending))

    async def flush(self, timeout_s: float = 5.0) -> None:
        """Return at once: the broker sees a message when it is published."""
        assert timeout_s > 0, "a flush needs time"
        self._check_connected()

    async def close(self) -> None:
        """Disconnect; safe to repeat. Raises a handler's failure nobody watched for."""
        self._connected = False
        for interest in self._interests:
            self._broker.remove(interest)
        await self._deliveries.close()

    def refuse(self, request: Delivery) -> None:
        """Tell the waiter for `request`'s reply that nobody listens."""
        reply = self._replies.get(request.reply_to)
        if self.connected and reply is not None and not reply.done():
            reply.set_exception(NoResponderError(f"nobody listens on {request.subject}"))

    def _subscribe(self, subject: str, handler: Handler, queue: str, max_pending: int) -> _Interest:
        consumer = self._deliveries.consume(handler, max_pending)
        pattern = tuple(subject.split("."))
        interest = _Interest(self, self._broker.next_number(), pattern, queue, consumer)
        self._interests.append(interest)
        self._broker.add(interest)
        return interest

    async def _replied(self, delivery: Delivery) -> None:
        reply = self._replies.get(delivery.subject)
        if reply is not None and not reply.done():
            reply.set_result(delivery.data)

    def _check_connected(self) -> None:
        if not self.connected:
            raise BusClosedError("the connection to the broker is down")


class _MemorySubscription:
    """A standing interest in a subject."""

    def __init__(self, broker: MemoryBroker, interest: _Interest) -> None:
        self._broker = broker
        self._interest = interest

    async def unsubscribe(self) -> None:
        """Stop deliveries; safe to repeat."""
        self._broker.remove(self._interest)
        self._interest.consumer.stop()


def _loop_now_us() -> int:
    return round(asyncio.get_running_loop().time() * 1e6)


def _matches(pattern: tuple[str, ...], subject: tuple[str, ...]) -> bool:
    if pattern[-1] == ">":
        pattern = pattern[:-1]
        if len(subject) <= len(pattern):
            return False
        subject = subject[: len(pattern)]
    return len(pattern) == len(subject) and all(
        want in ("*", token) for want, token in zip(pattern, subject, strict=True)
    )
