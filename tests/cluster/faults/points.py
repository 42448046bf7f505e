"""Points of a move at which one of its two workers is struck, as parameters; and what follows a SIGSTOP there."""

from collections.abc import Collection, Iterable

import pytest

from tests.cluster.faults.crowd import Crowd
from tests.cluster.faults.scene import standing, thaw
from tests.cluster.stack import Service, eventually


def struck_at(points: Iterable[str], number: str, in_short: Collection[tuple[str, str]]) -> list[object]:
    """Return each point with the signal's name; those that a short run leaves out are marked."""
    marks = {point: () if (point, number) in in_short else pytest.mark.reliability for point in points}
    return [pytest.param(point, number, marks=mark) for point, mark in marks.items()]


def go_on_without_and_with(crowd: Crowd, victim: Service) -> None:
    """See all clients served on while a worker stands still, and when it goes on."""
    eventually(lambda: standing(victim), "it stands")
    before = crowd.progress()
    eventually(lambda: crowd.on_since(before, 40), "all go on without it")
    thaw(victim)
    before = crowd.progress()
    eventually(lambda: crowd.on_since(before), "all go on with it")
