"""Look at all states of the migration protocol within bounds.

Bounds are: workers, tokens, moves, false suspicions, cancels, faults. Without any, wider and wider ones.
"""

import argparse
import math
import sys
import time

from tests.cluster.protocol.search import LADDER, Bounds, BrokenError, Search
from tests.cluster.protocol.state import Left


def main() -> int:
    """Search, and print what was seen; the exit code is 1 if anything is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.cluster.protocol", description=__doc__)
    parser.add_argument("bounds", type=int, nargs="*", help="six numbers")
    parser.add_argument("--minutes", type=float, default=0.0, help="stop looking after so long; 0: never")
    parser.add_argument("--states", type=int, default=1_000_000, help="and after so many states, about 2 KB each")
    chosen = parser.parse_args()
    until_s = time.monotonic() + 60 * chosen.minutes if chosen.minutes else math.inf
    if chosen.bounds and len(chosen.bounds) != 6:
        parser.error("bounds are six numbers: workers, tokens, moves, suspicions, cancels, faults")
    ladder = (Bounds(chosen.bounds[0], Left(*chosen.bounds[1:])),) if chosen.bounds else LADDER
    for bounds in ladder:
        if time.monotonic() < until_s and not _look(bounds, until_s, chosen.states):
            return 1
    return 0


def _look(bounds: Bounds, until_s: float, most_states: int) -> bool:
    began_s = time.monotonic()
    try:
        found = Search(bounds).run(until_s, most_states)
    except BrokenError as error:
        print(f"{bounds}\n{error}")  # noqa: T201 - the command's output
        return False
    seen = "all of them" if found.whole else f"stopped; {found.waiting} were still to be looked at"
    spent_s = time.monotonic() - began_s
    text = f"{bounds}: {found.states} states, {found.steps} steps in {spent_s:.0f} s, nothing wrong; {seen}"
    print(text, flush=True)  # noqa: T201 - the command's output
    return True


if __name__ == "__main__":
    sys.exit(main())
