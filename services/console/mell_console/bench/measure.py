"""Turns what happened to single requests into a report: pure."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

_QUANTILES = (50, 90, 99)


@dataclass(slots=True)
class Outcome:
    """One request as its client saw it; times in microseconds of one monotonic clock.

    `late_us` is how long after its planned time it was sent. `gaps_us` are the times between pieces of content.
    Token counts are the server's (`usage`); `counted` is False if it gave none and pieces stand in for them.
    `error` is a short kind, empty if the answer came whole.
    """

    sent_us: int
    late_us: int = 0
    first_us: int | None = None
    last_us: int | None = None
    ended_us: int = 0
    gaps_us: list[int] = field(default_factory=list)
    pieces: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    counted: bool = False
    error: str = ""


@dataclass(frozen=True, slots=True)
class ClientCost:
    """What the load generator itself used between the first request and the last."""

    cpu_s: float
    wall_s: float


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Return the value below which `percent` of `ordered` (ascending, not empty) lie, interpolated linearly."""
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def spread_ms(values_us: Sequence[float]) -> dict[str, float]:
    """Return mean and percentiles of `values_us` in milliseconds; empty for none."""
    if not values_us:
        return {}
    ordered = sorted(values_us)
    points = {f"p{percent}": percentile(ordered, percent) for percent in _QUANTILES}
    shown = {"mean": sum(ordered) / len(ordered), **points, "max": ordered[-1]}
    return {name: round(value / 1000, 3) for name, value in shown.items()}


def summarise(outcomes: Sequence[Outcome], cost: ClientCost) -> dict[str, Any]:
    """Return the report of a run; latencies are those of whole answers only, errors are counted by kind.

    `inter_token_ms` is the time between pieces as they arrived, `per_token_ms` each request's decode time divided
    by its tokens. Tokens a second are output tokens of all requests, whole or not, over the time from the first
    start to the last end.
    """
    whole = [outcome for outcome in outcomes if not outcome.error]
    wall_s = _wall_s(outcomes)
    output_tokens = sum(outcome.output_tokens for outcome in outcomes)
    prompt_tokens = sum(outcome.prompt_tokens for outcome in outcomes)
    return {
        "requests": len(outcomes),
        "whole": len(whole),
        "errors": dict(Counter(outcome.error for outcome in outcomes if outcome.error).most_common()),
        "duration_s": round(wall_s, 3),
        "prompt_tokens": prompt_tokens,
        "cached_tokens": sum(outcome.cached_tokens for outcome in outcomes),
        "output_tokens": output_tokens,
        "tokens_counted_by": _counted_by(whole),
        "requests_per_s": _per(len(whole), wall_s),
        "output_tokens_per_s": _per(output_tokens, wall_s),
        "total_tokens_per_s": _per(prompt_tokens + output_tokens, wall_s),
        "ttft_ms": spread_ms([outcome.first_us - outcome.sent_us for outcome in whole if outcome.first_us is not None]),
        "inter_token_ms": spread_ms([gap for outcome in whole for gap in outcome.gaps_us]),
        "per_token_ms": spread_ms(
            [per_token for outcome in whole if (per_token := _per_token_us(outcome)) is not None]
        ),
        "end_to_end_ms": spread_ms([outcome.ended_us - outcome.sent_us for outcome in whole]),
        "late_ms": spread_ms([outcome.late_us for outcome in outcomes]),
        "client_cpu_share": _per(cost.cpu_s, cost.wall_s),
    }


def _wall_s(outcomes: Sequence[Outcome]) -> float:
    if not outcomes:
        return 0.0
    first = min(outcome.sent_us for outcome in outcomes)
    return (max(outcome.ended_us for outcome in outcomes) - first) / 1e6


def _per_token_us(outcome: Outcome) -> float | None:
    if outcome.first_us is None or outcome.last_us is None or outcome.output_tokens < 2:
        return None
    return (outcome.last_us - outcome.first_us) / (outcome.output_tokens - 1)


def _counted_by(whole: Sequence[Outcome]) -> str:
    counted = sum(outcome.counted for outcome in whole)
    if counted == len(whole):
        return "usage"
    return "pieces" if counted == 0 else f"usage ({counted} answers), pieces ({len(whole) - counted})"


def _per(amount: float, time_s: float) -> float:
    return round(amount / time_s, 3) if time_s > 0 else 0.0
