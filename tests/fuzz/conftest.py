"""Counts every input that a fuzz target is given, and prints the figures at the end."""

from collections import Counter
from collections.abc import Callable

import pytest

_TALLY = pytest.StashKey[Counter[str]]()


def pytest_configure(config: pytest.Config) -> None:
    """Begin to count."""
    config.stash[_TALLY] = Counter()


@pytest.fixture(scope="session")
def tried(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Count one input of a target."""
    tally: Counter[str] = request.config.stash[_TALLY]

    def count(target: str) -> None:
        tally[target] += 1

    return count


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print how many inputs were tried."""
    tally = config.stash[_TALLY]
    if tally:
        width = max(map(len, tally))
        terminalreporter.section("fuzzing: inputs tried")
        for target, count in sorted(tally.items()):
            terminalreporter.write_line(f"{target:<{width}}  {count:>12,}")
        terminalreporter.write_line(f"{'in all':<{width}}  {sum(tally.values()):>12,}")
