"""Breadth first through all states, with what must hold in each, and what must be reachable from each."""

import math
import time
from collections import deque
from dataclasses import dataclass

from tests.cluster.protocol.state import Left, State, start
from tests.cluster.protocol.ways import Kind, holds, ways


class BrokenError(AssertionError):
    """Something that must hold does not; says by what steps that state is reached."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """How far is looked."""

    workers: int
    left: Left


SMALL = (
    Bounds(2, Left(tokens=2, moves=1, suspicions=0, cancels=1, faults=0)),
    Bounds(2, Left(tokens=1, moves=1, suspicions=0, cancels=0, faults=1)),
    Bounds(2, Left(tokens=1, moves=1, suspicions=1, cancels=1, faults=0)),
)
"""Quick enough for every run of the tests."""
GUARDED = (
    Bounds(2, Left(tokens=2, moves=1, suspicions=0, cancels=0, faults=0)),
    Bounds(2, Left(tokens=1, moves=1, suspicions=0, cancels=1, faults=0)),
    Bounds(2, Left(tokens=2, moves=1, suspicions=1, cancels=0, faults=0)),
    Bounds(2, Left(tokens=1, moves=1, suspicions=0, cancels=0, faults=1)),
)
"""The missing of each guard shows within one of these, in this order."""
FULL = Bounds(3, Left(tokens=3, moves=2, suspicions=1, cancels=1, faults=2))
LADDER = (
    Bounds(2, Left(tokens=2, moves=1, suspicions=1, cancels=0, faults=0)),
    Bounds(2, Left(tokens=2, moves=1, suspicions=0, cancels=0, faults=1)),
    Bounds(3, Left(tokens=1, moves=2, suspicions=0, cancels=0, faults=0)),
    Bounds(2, Left(tokens=1, moves=1, suspicions=1, cancels=1, faults=1)),
    Bounds(2, Left(tokens=2, moves=2, suspicions=0, cancels=0, faults=0)),
    Bounds(3, Left(tokens=1, moves=2, suspicions=1, cancels=0, faults=0)),
    Bounds(2, Left(tokens=3, moves=1, suspicions=1, cancels=1, faults=1)),
    FULL,
)
"""Wider and wider, for a soak: as many as the time allows."""


@dataclass(frozen=True, slots=True)
class Found:
    """What was looked at."""

    states: int
    steps: int
    waiting: int = 0
    """States seen and not looked at, for the search was stopped; whether ends are in reach is then not known."""

    @property
    def whole(self) -> bool:
        """Whether everything was looked at."""
        return not self.waiting


class Search:
    """All states within bounds. `run` raises `BrokenError`."""

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self._numbers: dict[State, int] = {}
        self._came: list[tuple[int, str]] = []
        self._good: list[list[int]] = []
        """By state: where things lead if they go well."""
        self._steps = 0

    def run(self, until_s: float = math.inf, most_states: float = math.inf) -> Found:
        """Look at everything; or up to that time of `time.monotonic` and so many states, at as much as possible."""
        first = start(self._bounds.workers, self._bounds.left)
        self._number(first, (-1, "start"))
        queue = deque([first])
        while queue and len(self._came) < most_states and time.monotonic() < until_s:
            state = queue.popleft()
            number = self._numbers[state]
            for what, kind, after in self._ways(state, number):
                self._steps += 1
                if after not in self._numbers:
                    self._number(after, (number, what))
                    self._check(after)
                    queue.append(after)
                if kind is Kind.GOOD:
                    self._good[number].append(self._numbers[after])
        states = list(self._numbers)
        if queue:
            return Found(len(states), self._steps, len(queue))
        self._check_ends(states)
        self._check_cycles()
        return Found(len(states), self._steps)

    def _number(self, state: State, came: tuple[int, str]) -> None:
        self._numbers[state] = len(self._came)
        self._came.append(came)
        self._good.append([])

    def _ways(self, state: State, number: int) -> list[tuple[str, Kind, State]]:
        try:
            return list(ways(state))
        except AssertionError as error:
            raise BrokenError(self._story(number, str(error))) from error

    def _check(self, state: State) -> None:
        fault = fault_of(state)
        if fault:
            raise BrokenError(self._story(self._numbers[state], fault))

    def _check_ends(self, states: list[State]) -> None:
        """From everywhere, things going well lead to the end of the request, with nothing held."""
        before: list[list[int]] = [[] for _ in states]
        for number, afters in enumerate(self._good):
            for after in afters:
                before[after].append(number)
        reached = {number for number, state in enumerate(states) if at_rest(state)}
        queue = deque(reached)
        while queue:
            for number in before[queue.popleft()]:
                if number not in reached:
                    reached.add(number)
                    queue.append(number)
        for number, state in enumerate(states):
            if number not in reached:
                raise BrokenError(self._story(number, f"from here the end is out of reach: {state}"))

    def _check_cycles(self) -> None:
        """Things that go well do not go round in circles: take away what leads nowhere, until nothing is left."""
        before: list[list[int]] = [[] for _ in self._good]
        out = [len(afters) for afters in self._good]
        for number, afters in enumerate(self._good):
            for after in afters:
                before[after].append(number)
        queue = deque(number for number, count in enumerate(out) if not count)
        left = len(out)
        while queue:
            left -= 1
            for number in before[queue.popleft()]:
                out[number] -= 1
                if not out[number]:
                    queue.append(number)
        if left:
            number = next(number for number, count in enumerate(out) if count)
            raise BrokenError(self._story(number, f"{left} states lead to a cycle without progress"))

    def _story(self, number: int, what: str) -> str:
        steps: list[str] = []
        while number >= 0:
            number, step = self._came[number]
            steps.append(step)
        return "\n".join([what, *reversed(steps)])


def at_rest(state: State) -> bool:
    """Whether the request is over and nothing of it is anywhere."""
    held = any(worker.run is not None for worker in state.workers)
    return state.front.ended and not held and not any(state.outs) and not any(state.ins) and not state.net


def fault_of(state: State) -> str:
    """Return what is wrong in a state."""
    owners = [(w.run.generation, number) for number, w in enumerate(state.workers) if w.run is not None]
    if len({generation for generation, _ in owners}) < len(owners):
        return f"two workers own one generation: {owners}"
    front = state.front
    if front.ended and front.owner is not None:
        return "somebody owns what is over"
    if not state.excused and not front.ended and not holds(state):
        return f"the owner, {front.owner}, has lost the sequence, and nobody is to blame"
    return ""
