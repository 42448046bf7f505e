"""The workload: requests as a trace gives them, and the transformations the command line offers."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from random import Random

US_PER_S = 1_000_000


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a trace; arrival counts from the trace's start."""

    arrival_us: int
    prompt_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] = ()
    """Mooncake's prefix blocks of 512 tokens: equal ids mean equal prefixes."""


@dataclass(frozen=True, slots=True)
class Scaling:
    """How to change a trace before it is replayed."""

    time: float = 1.0
    """Arrival times are multiplied by this: 0.5 doubles the rate."""
    length: float = 1.0
    copies: int = 1
    """The trace over itself, each further copy shifted cyclically by a random offset."""
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests in order of arrival, and what was left out of the trace and why."""

    name: str
    requests: Sequence[Request]
    excluded: dict[str, int] = field(default_factory=dict)


def scaled(workload: Workload, scaling: Scaling) -> Workload:
    """Apply a scaling; prefix blocks are dropped where lengths change, for they no longer match."""
    requests: Iterable[Request] = workload.requests
    if scaling.length != 1.0:
        requests = [_longer(r, scaling.length) for r in requests]
    if scaling.time != 1.0:
        requests = [replace(r, arrival_us=round(r.arrival_us * scaling.time)) for r in requests]
    if scaling.copies > 1:
        requests = _copied(list(requests), scaling.copies, scaling.seed)
    return replace(workload, requests=list(requests))


def _longer(request: Request, factor: float) -> Request:
    return replace(
        request,
        prompt_tokens=max(1, round(request.prompt_tokens * factor)),
        output_tokens=max(1, round(request.output_tokens * factor)),
        hash_ids=(),
    )


def _copied(requests: list[Request], copies: int, seed: int) -> list[Request]:
    random = Random(seed)  # noqa: S311 - a reproducible workload, no secret
    span = requests[-1].arrival_us + 1
    out = list(requests)
    for _ in range(copies - 1):
        offset = random.randrange(span)
        out += [replace(r, arrival_us=(r.arrival_us + offset) % span) for r in requests]
    return sorted(out, key=_arrival)


def without_oversized(workload: Workload, capacity_tokens: int) -> Workload:
    """Leave out, and count, requests that would outgrow an empty GPU."""
    fitting = [r for r in workload.requests if r.prompt_tokens + r.output_tokens <= capacity_tokens]
    over = len(workload.requests) - len(fitting)
    excluded = {**workload.excluded, "over capacity": over} if over else workload.excluded
    return Workload(workload.name, fitting, excluded)


def _arrival(request: Request) -> int:
    return request.arrival_us
