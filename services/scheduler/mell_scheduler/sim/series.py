"""What a run records second by second, and the figures that the report takes from it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields

Progress = Callable[[str, float, float], None]
"""(run, simulated seconds, of how many): told as a run goes on."""


@dataclass(slots=True)
class Series:
    """One value per sample; counts are of what happened since the sample before."""

    time_s: list[float] = field(default_factory=list)
    gpus: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    moves: list[int] = field(default_factory=list)
    moved_tokens: list[int] = field(default_factory=list)
    copied_tokens: list[int] = field(default_factory=list)
    """Of the tokens moved, those whose KV went over a link."""
    prefilled_tokens: list[int] = field(default_factory=list)
    """Of the tokens moved, those that the target prefilled anew."""
    preemptions: list[int] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class LatencyPlots:
    """What a minute's arrivals saw; minutes in which nothing that arrived has ended are left out."""

    time_s: list[float]
    """Middle of the minute."""
    ttft_p50_s: list[float]
    ttft_p90_s: list[float]
    tpot_p50_ms: list[float]
    tpot_p90_ms: list[float]
    rows: dict[str, float]
    """Figures over the whole window, by name."""


@dataclass(slots=True)
class Tally:
    """Counts since the last sample."""

    moves: int = 0
    moved_tokens: int = 0
    copied_tokens: int = 0
    prefilled_tokens: int = 0
    preemptions: int = 0


@dataclass(frozen=True, slots=True)
class Window:
    """The part of a run that means are taken over, in seconds: from `warmup_s` up to `until_s`."""

    warmup_s: float
    until_s: float


def arrivals_in(window: Window, arrivals_us: Iterable[int]) -> int:
    """How many of these arrivals fall into the window."""
    return sum(1 for at_us in arrivals_us if window.warmup_s * 1e6 <= at_us < window.until_s * 1e6)


def windowed(series: Series, window: Window) -> Series:
    """The samples with warmup_s <= time < until_s."""
    inside = [i for i, t in enumerate(series.time_s) if window.warmup_s <= t < window.until_s]
    first, end = (inside[0], inside[-1] + 1) if inside else (0, 0)
    return Series(*(getattr(series, column.name)[first:end] for column in fields(series)))


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value with at least `share` of all at or below it; 0 if there are none."""
    if not values:
        return 0.0
    ordered = sorted(values)
    return ordered[max(0, min(len(ordered) - 1, -int(-share * len(ordered) // 1) - 1))]
