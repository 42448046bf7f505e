"""Time and messages that a test controls: every message is numbered, and a plan decides what becomes of it."""

import heapq
from collections.abc import Callable, Mapping
from itertools import count
from typing import Any, Literal, NamedTuple

MS_US = 1_000
SECOND_US = 1_000_000
LATENCY_US = 500

Verdict = Literal["deliver", "lose", "repeat", "delay", "delay long", "cut", "corrupt", "kill sender", "kill receiver"]
DELAYS_US = {"delay": 40 * MS_US, "delay long": 3 * SECOND_US}


class Flight(NamedTuple):
    """One message, or one transfer of blocks, between two named parties."""

    number: int
    what: str
    sender: str
    receiver: str


Plan = Callable[[Flight], Verdict]


def undisturbed(_: Flight) -> Verdict:
    """Everything arrives, once and soon."""
    return "deliver"


def disturb(verdicts: Mapping[int, Verdict]) -> Plan:
    """Only the flights of these numbers are disturbed."""
    return lambda flight: verdicts.get(flight.number, "deliver")


class Asker(NamedTuple):
    """Who asks, and what is done with the reply, or with the reason why there is none: one of the two, later."""

    name: str
    answered: Callable[[Any], None]
    unanswered: Callable[[Any], None]


class Network:
    """A virtual clock, flights, and requests with their replies."""

    def __init__(self, plan: Plan = undisturbed) -> None:
        self.now_us = 0
        self.plan = plan
        self.flights: list[Flight] = []
        self.dead: set[str] = set()
        self.mourn: Callable[[str], None] = lambda _: None
        """Called a moment after somebody has died."""
        self._order = count()
        self._due: list[tuple[int, int, Callable[[], None]]] = []
        self._questions: dict[str, Asker] = {}

    # --- time

    def later(self, after_us: int, action: Callable[[], None]) -> None:
        """Let something happen after a while; equal times keep their order."""
        heapq.heappush(self._due, (self.now_us + after_us, next(self._order), action))

    def run_until(self, reached: Callable[[], bool], limit_us: int) -> bool:
        """Let things happen until something is so; False if it is not after `limit_us` more."""
        end_us = self.now_us + limit_us
        while not reached():
            if not self._due or self._due[0][0] > end_us:
                return False
            self.now_us, _, action = heapq.heappop(self._due)
            action()
        return True

    # --- messages

    def judge(self, what: str, sender: str, receiver: str) -> Verdict:
        """Number a flight, and return what shall become of it; who is to be killed is dead from now on."""
        flight = Flight(len(self.flights), what, sender, receiver)
        self.flights.append(flight)
        verdict = self.plan(flight)
        if verdict == "kill sender":
            self.kill(sender)
        elif verdict == "kill receiver":
            self.kill(receiver)
        return verdict

    def kill(self, name: str) -> None:
        """Nothing from or to this party arrives any more, but what is under way already."""
        self.dead.add(name)
        self.later(LATENCY_US, lambda: self.mourn(name))

    def fly(self, what: str, sender: str, receiver: str, arrive: Callable[[], None]) -> None:
        """Send a message."""
        if sender in self.dead:
            return
        verdict = self.judge(what, sender, receiver)
        if verdict in {"lose", "cut", "corrupt"}:
            return

        def arrive_if_alive() -> None:
            if receiver not in self.dead:
                arrive()

        self.later(LATENCY_US + DELAYS_US.get(verdict, 0), arrive_if_alive)
        if verdict == "repeat":
            self.later(3 * LATENCY_US, arrive_if_alive)

    def ask(self, what: str, asker: Asker, receiver: str, arrive: Callable[[str], None], timeout_us: int) -> None:
        """Send a request."""
        if asker.name in self.dead:
            return
        reply_to = f"reply-{next(self._order)}"
        self._questions[reply_to] = asker
        if receiver in self.dead:
            self.later(LATENCY_US, lambda: self._give_up(reply_to, "no_responder"))
            return
        self.later(timeout_us, lambda: self._give_up(reply_to, "timeout"))
        self.fly(what, asker.name, receiver, lambda: arrive(reply_to))

    def reply(self, reply_to: str, what: str, sender: str, message: object) -> None:
        """Answer a request; only the first answer in time counts."""
        asker = self._questions.get(reply_to)

        def settle() -> None:
            waiting = self._questions.pop(reply_to, None)
            if waiting is not None:
                waiting.answered(message)

        self.fly(what, sender, asker.name if asker else "", settle)

    def _give_up(self, reply_to: str, why: str) -> None:
        waiting = self._questions.pop(reply_to, None)
        if waiting is not None and waiting.name not in self.dead:
            waiting.unanswered(why)
