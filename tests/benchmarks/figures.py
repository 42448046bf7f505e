"""Figures of a benchmark: medians with their ranges, Markdown tables, and what must stand beside them."""

import os
import statistics
import time
from collections.abc import Sequence


def size(name: str, default: int) -> int:
    """Return the size of a run: the variable `BENCH_<name>`, else `default`."""
    return int(os.environ.get(f"BENCH_{name}", default))


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Return the median of some rounds and their range as text."""
    if len(values) == 1:
        return f"{values[0]:,.{digits}f}"
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def verdict(ratios: Sequence[float], target: float) -> str:
    """Return what rounds of a ratio say of a target: a range that spans it shows nothing."""
    if min(ratios) >= target:
        return f"at least {target:g}: shown"
    return f"at least {target:g}: {'missed' if max(ratios) < target else 'not shown'}"


def print_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table under its title, ready to be pasted."""
    lines = [" | ".join(row) for row in (head, ["---"] * len(head), *rows)]
    print(f"\n{title}\n", *(f"| {line} |" for line in lines), sep="\n")  # noqa: T201 - figures are for reading


def memory_read_gb_per_s() -> float:
    """Return how fast this machine reads memory just now; other figures mean little where it varies."""
    data = bytes(64 * 2**20)
    begun_s = time.perf_counter()
    assert data.find(b"\x01") == -1
    return len(data) / (time.perf_counter() - begun_s) / 1e9
