"""`python -m tests.cluster.simulation`: soak through many seeds, or replay one."""

import argparse
import multiprocessing
import os
import sys
import time
from collections import Counter

from tests.cluster.simulation.play import Reduced, play, reduce, report, try_seed
from tests.cluster.simulation.scenario import draw


def main() -> int:
    """Parse the command line and do it; the exit code is 1 if anything was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.cluster.simulation", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    soak = commands.add_parser("soak", help="run seed after seed, on all cores")
    soak.add_argument("--seeds", type=int, default=0, help="how many; 0: until the time is over")
    soak.add_argument(
        "--minutes", type=float, default=0.0, help="for how long, at most; 0: 30, or until all seeds are run"
    )
    soak.add_argument("--first", type=int, default=1000, help="the first seed")
    soak.add_argument("--jobs", type=int, default=os.cpu_count(), help="how many at once")
    again = commands.add_parser("replay", help="run one seed and tell its story")
    again.add_argument("seed", type=int)
    again.add_argument("--faults", default="all", help="numbers of its faults, e.g. 0,3; all; none")
    again.add_argument("--wishes", default="all", help="numbers of its requests, the same way")
    again.add_argument("--reduce", action="store_true", help="leave out what is not needed for it to fail")
    chosen = parser.parse_args()
    if chosen.command == "soak":
        minutes = chosen.minutes or (0.0 if chosen.seeds else 30.0)
        return _soak(chosen.first, chosen.seeds, minutes, chosen.jobs)
    return _replay(chosen.seed, chosen.faults, chosen.wishes, reducing=chosen.reduce)


def _soak(first: int, seeds: int, minutes: float, jobs: int) -> int:
    began_s = time.monotonic()
    places: Counter[str] = Counter()
    run = 0
    batch = 10 * jobs
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        while (not seeds or run < seeds) and (not minutes or time.monotonic() < began_s + 60 * minutes):
            some = range(first + run, first + run + min(batch, seeds - run if seeds else batch))
            for found in pool.imap_unordered(try_seed, some):
                if found is not None:
                    places[found[0]] += 1
                    print(found[1], flush=True)  # noqa: T201 - the command's output
            run += len(some)
    failed, spent_s = places.total(), time.monotonic() - began_s
    print(f"{run} seeds from {first} on in {spent_s:.0f} s: {failed} failed")  # noqa: T201
    for place, count in places.most_common():
        print(f"  {count} x {place}")  # noqa: T201
    return int(bool(failed))


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
