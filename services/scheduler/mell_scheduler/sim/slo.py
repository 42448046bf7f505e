"""Latency figures and objectives of a timed run, and the search for the fewest GPU-hours at equal objectives."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from mell_scheduler.policy import PolicySettings
from mell_scheduler.sim.driver import Driver
from mell_scheduler.sim.engine import Sequence as Served
from mell_scheduler.sim.requests import Workload
from mell_scheduler.sim.series import Window, percentile, windowed
from mell_scheduler.sim.timed import TimedRun, TimedSettings

ATTAINMENT = 0.99
"""Share of requests that must meet all objectives."""
DRAIN_S = 600.0
"""How long after the last arrival a request may still finish."""
HEAD_ROOMS = (0.0, 0.1, 0.2)
SPARES = (3, 4, 5, 6, 7, 8, 10)

MakeDriver = Callable[[str, PolicySettings], Driver]


@dataclass(frozen=True, slots=True)
class Latency:
    """One timed run, of the requests that arrived in the window."""

    attainment: float
    """Share that met all objectives; rejected and unfinished ones are misses."""
    ttft_attainment: float
    tpot_attainment: float
    gap_attainment: float
    ttft_p50_s: float
    ttft_p99_s: float
    tpot_p50_s: float
    tpot_p99_s: float
    e2e_p50_s: float
    e2e_p99_s: float
    unfinished: int
    gpu_hours: float
    """Per hour of the window, so a mean: starting, idle and busy GPUs."""
    moves_per_s: float
    preemptions: int


def measure(run: TimedRun, window: Window, rejected: int = 0) -> Latency:
    """Judge a finished run."""
    judged = [s for s in run.sequences if window.warmup_s <= s.arrival_s < window.until_s]
    mean_prompt = sum(s.request.prompt_tokens for s in run.sequences) // max(1, len(run.sequences))
    done = [s for s in judged if s.finished_s is not None]
    met = [_met(s, run.settings, mean_prompt) for s in done]
    count = max(1, len(judged) + rejected)
    ttfts = [s.first_token_s - s.arrival_s for s in done if s.first_token_s is not None]
    cut = windowed(run.series, window)
    samples = max(1, len(cut.gpus))
    return Latency(
        attainment=sum(all(m) for m in met) / count,
        ttft_attainment=sum(m[0] for m in met) / count,
        tpot_attainment=sum(m[1] for m in met) / count,
        gap_attainment=sum(m[2] for m in met) / count,
        ttft_p50_s=percentile(ttfts, 0.5),
        ttft_p99_s=percentile(ttfts, 0.99),
        tpot_p50_s=percentile([s.tpot_s for s in done], 0.5),
        tpot_p99_s=percentile([s.tpot_s for s in done], 0.99),
        e2e_p50_s=percentile([_e2e_s(s) for s in done], 0.5),
        e2e_p99_s=percentile([_e2e_s(s) for s in done], 0.99),
        unfinished=len(judged) - len(done),
        gpu_hours=sum(cut.gpus) / samples * run.settings.roofline.gpus,
        moves_per_s=sum(cut.moves) / (samples * run.settings.tick_s),
        preemptions=sum(cut.preemptions),
    )


def _e2e_s(sequence: Served) -> float:
    assert sequence.finished_s is not None
    return sequence.finished_s - sequence.arrival_s


def _met(sequence: Served, settings: TimedSettings, mean_prompt: int) -> tuple[bool, bool, bool]:
    """First token, mean per token, 99% of gaps."""
    assert sequence.first_token_s is not None
    roofline, slo = settings.roofline, settings.slo
    unloaded_s = roofline.unloaded_ttft_s(max(sequence.request.prompt_tokens, mean_prompt))
    return (
        sequence.first_token_s - sequence.arrival_s <= slo.ttft * unloaded_s,
        sequence.tpot_s <= slo.tpot * roofline.unloaded_tpot_s(1),
        sequence.slow_tokens <= 0.01 * sequence.request.output_tokens,
    )


@dataclass(frozen=True, slots=True)
class Study:
    """What all runs that are compared share."""

    workload: Workload
    settings: TimedSettings
    window: Window
    make_driver: MakeDriver

    def run(self, name: str, policy: PolicySettings) -> tuple[TimedRun, Latency]:
        """One run of a policy to its end, and its figures."""
        run = TimedRun(self.workload, self.settings, self.make_driver(name, policy))
        for _ in run.run(self.window.until_s, DRAIN_S):
            pass
        return run, measure(run, self.window, self.workload.excluded.get("over capacity", 0))

    def with_spares(self, spares: int) -> "Study":
        """The same with another number of warm GPUs."""
        return replace(self, settings=replace(self.settings, spares=spares))


@dataclass(frozen=True, slots=True)
class Found:
    """The cheapest setting of a policy that met the objectives."""

    policy: str
    head_room: float
    spares: int
    latency: Latency


def cheapest(
    study: Study,
    name: str,
    head_rooms: Sequence[float] = HEAD_ROOMS,
    spares: Sequence[int] = SPARES,
) -> Found | None:
    """The same search for every policy: for each head-room the fewest spares that meet the objectives.

    Of these the fewest GPU-hours; None if nothing on the grid meets them.
    """
    found = [hit for head_room in head_rooms if (hit := _fewest_spares(study, name, head_room, spares)) is not None]
    return min(found, key=lambda hit: hit.latency.gpu_hours, default=None)


def _fewest_spares(study: Study, name: str, head_room: float, spares: Sequence[int]) -> Found | None:
    """By bisection: more spares never meet fewer objectives."""
    ordered = sorted(spares)
    best: Found | None = None
    low, high = 0, len(ordered)
    while low < high:
        middle = (low + high) // 2
        _, latency = study.with_spares(ordered[middle]).run(name, PolicySettings(head_room=head_room))
        if latency.attainment >= ATTAINMENT:
            best, high = Found(name, head_room, ordered[middle], latency), middle
        else:
            low = middle + 1
    return best


def highest_rate(
    study: Study, name: str, policy: PolicySettings, scaled_by: Callable[[float], Workload], steps: int = 7
) -> float:
    """The dual: the highest load on `settings.max_gpus` that meets the objectives, by bisection.

    `scaled_by` gives the workload at a multiple of its rate; the answer is that multiple, up to 4.
    """
    low, high = 0.0, 4.0
    for _ in range(steps):
        middle = (low + high) / 2
        _, latency = replace(study, workload=scaled_by(middle)).run(name, policy)
        low, high = (middle, high) if latency.attainment >= ATTAINMENT else (low, middle)
    return low
