"""`python -m tests.cluster.protocol [workers tokens moves suspicions cancels faults]`: look at all states within bounds."""

import argparse
import sys
import time

from tests.cluster.protocol.search import FULL, Bounds, BrokenError, Search
from tests.cluster.protocol.state import Left


def main() -> int:
    """Search, and print what was seen; the exit code is 1 if anything is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.cluster.protocol", description=__doc__)
    parser.add_argument("bounds", type=int, nargs="*", default=[FULL.workers, *FULL.left])
    parser.add_argument("--minutes", type=float, default=0.0, help="stop looking after so long; 0: never")
    chosen = parser.parse_args()
    workers, *left = chosen.bounds
    began_s = time.monotonic()
    search = Search(Bounds(workers, Left(*left)))
    try:
        found = search.run(until_s=began_s + 60 * chosen.minutes if chosen.minutes else None)
    except BrokenError as error:
        print(error)  # noqa: T201 - the command's output
        return 1
    seen = "all of them" if found.whole else f"no more in the time given; {found.waiting} were still to be looked at"
    spent_s = time.monotonic() - began_s
    print(f"{found.states} states, {found.steps} steps in {spent_s:.0f} s: nothing wrong; {seen}")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
