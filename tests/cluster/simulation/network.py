"""The broker: NATS's promises and no more. Order holds within one subject and publisher; all else is chance."""

from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, TypeAdapter

from mell_shared.codec import decode, encode
from tests.cluster.simulation.chance import Chance
from tests.cluster.simulation.clock import SECOND_US, EventQueue
from tests.cluster.simulation.process import Answered, Process

Deliver = Callable[[Any, str], None]
"""Takes a message and where to reply, "" if nowhere."""
_NOTICE_US = SECOND_US // 10
_RECONNECT_US = SECOND_US


class Conditions:
    """What the faults under way do to messages; the run's director keeps it."""

    def __init__(self) -> None:
        self.loss = 0.0
        self.repeat = 0.0
        self.delay_us = 0
        self.broker_up = True
        self.apart: list[frozenset[str]] = []

    def joined(self, one: Process, other: Process) -> bool:
        """Whether the two reach each other."""
        return frozenset((one.node, other.node)) not in self.apart


class _Request:
    def __init__(self, asker: Process, replies: TypeAdapter[Any], answered: Answered) -> None:
        self.asker = asker
        self.replies = replies
        self.answered = answered


class Network:
    """Carries every message as bytes. A request ends in exactly one call: a reply, or why there is none."""

    def __init__(self, queue: EventQueue, chance: Chance) -> None:
        self.conditions = Conditions()
        self.delivered = 0
        self._queue = queue
        self._chance = chance
        self._listeners: dict[str, dict[Process, tuple[TypeAdapter[Any], Deliver]]] = {}
        self._connected: dict[Process, bool] = {}
        self._lanes: dict[tuple[str, str, str], tuple[int, int]] = {}
        self._requests: dict[str, _Request] = {}
        self._count = 0

    # --- connections

    def connect(self, process: Process) -> None:
        """Join the broker; while it is gone, as soon as it is back."""
        self._connected[process] = self.conditions.broker_up
        if not self.conditions.broker_up:
            self._notice_loss(process)

    def connected(self, process: Process) -> bool:
        """Whether what the process sends goes anywhere."""
        return self._connected.get(process, False)

    def listen(self, process: Process, subject: str, adapter: TypeAdapter[Any], deliver: Deliver) -> None:
        """Deliver a subject's messages to a process."""
        self._listeners.setdefault(subject, {})[process] = (adapter, deliver)

    def ignore(self, process: Process, subject: str) -> None:
        """Deliver a subject's messages no more."""
        self._listeners.get(subject, {}).pop(process, None)

    def forget(self, process: Process) -> None:
        """The broker learns that a process is gone."""
        self._connected.pop(process, None)
        for listeners in self._listeners.values():
            listeners.pop(process, None)
        for inbox in [i for i, request in self._requests.items() if request.asker is process]:
            del self._requests[inbox]

    def drop(self, process: Process) -> None:
        """Cut a process's connection; it notices, and connects again by itself once the broker is up."""
        if self._connected.get(process):
            self._connected[process] = False
            self._notice_loss(process)

    def break_down(self) -> None:
        """The broker is gone, with all that is under way."""
        self.conditions.broker_up = False
        for process in list(self._connected):
            self.drop(process)

    def come_back(self) -> None:
        """The broker is there again."""
        self.conditions.broker_up = True
        for process in [p for p, up in self._connected.items() if not up]:
            self._reconnect_soon(process)

    def _notice_loss(self, process: Process) -> None:
        self._count += 1
        notice_us = self._chance.between(0, _NOTICE_US, "notice", process.name, self._count)
        self._queue.after(notice_us, lambda: process.take(lambda: self._lost(process)))
        if self.conditions.broker_up:
            self._queue.after(notice_us, lambda: self._reconnect_soon(process))

    def _lost(self, process: Process) -> None:
        for inbox in [i for i, request in self._requests.items() if request.asker is process]:
            self._requests.pop(inbox).answered("disconnected")
        process.connection_lost()

    def _reconnect_soon(self, process: Process) -> None:
        self._count += 1
        wait_us = self._chance.between(0, _RECONNECT_US, "reconnect", process.name, self._count)
        self._queue.after(wait_us, lambda: process.take(lambda: self._reconnect(process)))

    def _reconnect(self, process: Process) -> None:
        if self.conditions.broker_up and self._connected.get(process) is False:
            self._connected[process] = True
            process.connection_restored()

    # --- messages

    def publish(self, sender: Process, subject: str, message: BaseModel, reply_to: str = "") -> bool:
        """Send and forget; returns whether anybody listens."""
        if not self.connected(sender):
            return False
        data = encode(message)
        if subject in self._requests:
            self._send_reply(sender, subject, data)
            return True
        listeners = self._listeners.get(subject, {})
        there = [process for process in listeners if self._connected.get(process)]
        for process in there:
            self._send(sender, subject, process, lambda process=process: self._arrive(process, subject, data, reply_to))
        return bool(there)

    def request(
        self,
        sender: Process,
        subject: str,
        message: BaseModel,
        *,
        replies: TypeAdapter[Any],
        timeout_us: int,
        answered: Answered,
    ) -> None:
        """Send and wait for one reply."""
        self._count += 1
        inbox = f"inbox-{self._count}"
        self._requests[inbox] = _Request(sender, replies, answered)
        if not self.connected(sender):
            self._queue.after(1, lambda: sender.take(lambda: self._settle(inbox, "disconnected")))
            return
        if not self.publish(sender, subject, message, inbox):
            refuse_us = self._latency_us("refused", inbox)
            self._queue.after(refuse_us, lambda: sender.take(lambda: self._settle(inbox, "no_responder")))
            return
        sender.after(timeout_us, lambda: self._settle(inbox, "timeout"))

    def _arrive(self, process: Process, subject: str, data: bytes, reply_to: str) -> None:
        listener = self._listeners.get(subject, {}).get(process)
        if listener is None:
            return
        self.delivered += 1
        adapter, deliver = listener
        message = decode(adapter, data, unknown_fields="forbid")
        process.take(lambda: deliver(message, reply_to))

    def _send_reply(self, sender: Process, inbox: str, data: bytes) -> None:
        request = self._requests[inbox]
        self._send(sender, inbox, request.asker, lambda: self._reply_arrived(request, inbox, data))

    def _reply_arrived(self, request: _Request, inbox: str, data: bytes) -> None:
        self.delivered += 1
        reply = decode(request.replies, data, unknown_fields="forbid")
        request.asker.take(lambda: self._settle(inbox, reply))

    def _settle(self, inbox: str, outcome: object) -> None:
        request = self._requests.pop(inbox, None)
        if request is not None:
            request.answered(outcome)

    # --- the way of one message

    def _send(self, sender: Process, subject: str, receiver: Process, arrive: Callable[[], None]) -> None:
        lane = (sender.name, subject, receiver.name)
        last_us, sent = self._lanes.get(lane, (0, 0))
        name = (*lane, sent)
        due_us = max(last_us, self._queue.now_us + self._latency_us(*name))
        self._lanes[lane] = (due_us, sent + 1)

        def hand_over() -> None:
            if self._connected.get(receiver) and self.conditions.joined(sender, receiver):
                arrive()

        conditions = self.conditions
        if not conditions.joined(sender, receiver) or self._chance.happens(conditions.loss, "lost", *name):
            return
        self._queue.at(due_us, hand_over)
        if self._chance.happens(conditions.repeat, "repeated", *name):
            # A late copy keeps no order, else it could only ever follow its original directly.
            self._queue.at(due_us + self._chance.between(0, 2 * SECOND_US, "copy", *name), hand_over)

    def _latency_us(self, *name: str | int) -> int:
        delay_us = self.conditions.delay_us
        late_us = self._chance.between(0, delay_us, "delay", *name) if delay_us else 0
        return self._chance.between(100, 2_000, "latency", *name) + late_us
