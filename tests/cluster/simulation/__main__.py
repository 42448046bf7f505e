"""`python -m tests.cluster.simulation`: soak through many seeds, or replay one."""

import argparse
import sys
import time
from collections import Counter

from tests.cluster.simulation.play import Failure, Reduced, play, reduce, report
from tests.cluster.simulation.scenario import draw


def main() -> int:
    """Parse the command line and do it; the exit code is 1 if anything was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.cluster.simulation", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    soak = commands.add_parser("soak", help="run seed after seed")
    soak.add_argument("--seeds", type=int, default=0, help="how many; 0: until the time is over")
    soak.add_argument("--minutes", type=float, default=30.0, help="for how long, at most")
    soak.add_argument("--first", type=int, default=0, help="the first seed")
    again = commands.add_parser("replay", help="run one seed and tell its story")
    again.add_argument("seed", type=int)
    again.add_argument("--faults", default="all", help="numbers of its faults, e.g. 0,3; all; none")
    again.add_argument("--wishes", default="all", help="numbers of its requests, the same way")
    again.add_argument("--reduce", action="store_true", help="leave out what is not needed for it to fail")
    chosen = parser.parse_args()
    if chosen.command == "soak":
        return _soak(chosen.first, chosen.seeds, chosen.minutes)
    return _replay(chosen.seed, chosen.faults, chosen.wishes, reducing=chosen.reduce)


def _soak(first: int, seeds: int, minutes: float) -> int:
    started_s = time.monotonic()
    failures: list[Failure] = []
    seed = first
    while (not seeds or seed < first + seeds) and time.monotonic() < started_s + 60 * minutes:
        failure = play(draw(seed))
        if failure is not None:
            failures.append(failure)
            print(report(reduce(failure)), flush=True)  # noqa: T201 - the command's output
        seed += 1
    spent_s = time.monotonic() - started_s
    print(f"{seed - first} seeds from {first} on in {spent_s:.0f} s: {len(failures)} failed")  # noqa: T201
    for place, count in Counter(failure.place for failure in failures).most_common():
        print(f"  {count} x {place}")  # noqa: T201
    return int(bool(failures))


def _replay(seed: int, faults: str, wishes: str, *, reducing: bool) -> int:
    whole = draw(seed)
    kept = (_numbers(faults, len(whole.faults)), _numbers(wishes, len(whole.wishes)))
    failure = play(whole.only(*kept))
    if failure is None:
        print(f"seed {seed}: all is well")  # noqa: T201
        return 0
    reduced = Reduced(*kept, failure)
    if reducing:
        fewer = reduce(failure)
        numbers = ([kept[0][n] for n in fewer.faults], [kept[1][n] for n in fewer.wishes])
        reduced = Reduced(*numbers, fewer.failure)
    print(report(reduced, most_lines=10_000))  # noqa: T201
    return 1


def _numbers(text: str, count: int) -> list[int]:
    if text == "all":
        return list(range(count))
    return [] if text == "none" else [int(number) for number in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
