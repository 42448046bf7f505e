"""Plays scenarios, and reduces one that fails to what is needed for it to fail."""

import traceback
from collections.abc import Callable
from dataclasses import dataclass

from tests.cluster.simulation.scenario import Scenario, draw
from tests.cluster.simulation.simulation import Simulation
from tests.cluster.simulation.story import Story


@dataclass(frozen=True, slots=True)
class Failure:
    """What a run found. `place` names where; two failures of one place are taken for the same."""

    scenario: Scenario
    what: str
    place: str
    story: Story


@dataclass(frozen=True, slots=True)
class Reduced:
    """A failing scenario's faults and wishes that are needed, by number."""

    faults: list[int]
    wishes: list[int]
    failure: Failure


def play(scenario: Scenario) -> Failure | None:
    """Return what the run of a scenario found, or None."""
    simulation = Simulation(scenario)
    try:
        simulation.run()
    except Exception as error:  # noqa: BLE001 - whatever a core raises is a bug found, and is told with its story
        frame = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__}: {error}"
        return Failure(scenario, what, f"{frame.filename.rpartition('/')[2]}:{frame.name}", simulation.judge.story)
    return None


def reduce(failure: Failure, *, most_runs: int = 200) -> Reduced:
    """Take out faults, then wishes, as long as the run still fails in the same place."""
    whole = failure.scenario
    best = Reduced(list(range(len(whole.faults))), list(range(len(whole.wishes))), failure)
    left = most_runs

    def attempt(faults: list[int], wishes: list[int]) -> bool:
        nonlocal best, left
        left -= 1
        found = play(whole.only(faults, wishes)) if left >= 0 else None
        if found is None or found.place != failure.place:
            return False
        best = Reduced(faults, wishes, found)
        return True

    # Wishes first in bulk: a run with few of them is quick.
    for _ in range(2):
        _thin(best.wishes, lambda wishes: attempt(best.faults, wishes))
        _thin(best.faults, lambda faults: attempt(faults, best.wishes))
    return best


def _thin(items: list[int], attempt: Callable[[list[int]], bool]) -> None:
    """Leave out halves, quarters, ... single items, keeping each omission that `attempt` accepts."""
    size = (len(items) + 1) // 2
    while size:
        start = 0
        while start < len(items):
            fewer = items[:start] + items[start + size :]
            if attempt(fewer):
                items = fewer
            else:
                start += size
        size //= 2


def try_seed(seed: int) -> tuple[str, str] | None:
    """Return where a seed fails, and its story reduced; or None. For a process of its own."""
    failure = play(draw(seed))
    return None if failure is None else (failure.place, report(reduce(failure)))


def report(reduced: Reduced, *, most_lines: int = 150) -> str:
    """Tell a failure: what is wrong, how to see it again, the faults, and what happened last."""
    failure = reduced.failure
    scenario = failure.scenario
    numbers = f"--faults {_listed(reduced.faults)} --wishes {_listed(reduced.wishes)}"
    lines = list(failure.story.tell())[-most_lines:]
    return "\n".join(
        [
            f"seed {scenario.seed}: {failure.what} ({failure.place})",
            f"again: python -m tests.cluster.simulation replay {scenario.seed} {numbers}",
            f"cluster: {scenario.policy}, {len(scenario.workers)} workers, faults:",
            *(f"  {fault}" for fault in scenario.faults),
            "story:",
            *lines,
        ]
    )


def _listed(numbers: list[int]) -> str:
    return ",".join(map(str, numbers)) or "none"
