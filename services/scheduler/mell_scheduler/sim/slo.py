"""Latency figures and objectives of a timed run, and the search for the fewest GPU-hours at equal objectives."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

from mell_scheduler.policy import PolicySettings
from mell_scheduler.sim.driver import Driver
from mell_scheduler.sim.engine import Sequence as Served
from mell_scheduler.sim.memory import DecisionLog, NanosecondClock
from mell_scheduler.sim.requests import Workload
from mell_scheduler.sim.series import LatencyPlots, Progress, Window, percentile, windowed
from mell_scheduler.sim.timed import TimedRun, TimedSettings

ATTAINMENT = 0.99
"""Share of requests that must meet all objectives."""
DRAIN_S = 600.0
"""How long after the last arrival a request may still finish."""
HEAD_ROOMS = (0.0, 0.1)
SPARES = (1, 2, 3, 4, 5, 6, 7, 8, 10)

MakeDriver = Callable[[str, PolicySettings], Driver]


@dataclass(frozen=True, slots=True)
class Latency:
    """One timed run, of the requests that arrived in the window."""

    attainment: float
    """Share that met all objectives; rejected and unfinished ones are misses."""
    ttft_attainment: float
    tpot_attainment: float
    gap_attainment: float
    resume_attainment: float
    """Share that went on in time after every preemption, or had none."""
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
    count = len(judged) + rejected

    def share(attained: int) -> float:
        return attained / count if count else 1.0

    ttfts = [s.first_token_s - s.arrival_s for s in done if s.first_token_s is not None]
    cut = windowed(run.series, window)
    samples = max(1, len(cut.gpus))
    return Latency(
        attainment=share(sum(all(m) for m in met)),
        ttft_attainment=share(sum(m[0] for m in met)),
        tpot_attainment=share(sum(m[1] for m in met)),
        gap_attainment=share(sum(m[2] for m in met)),
        resume_attainment=share(sum(m[3] for m in met)),
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


_MINUTE_S = 60.0


def latency_plots(run: TimedRun, latency: Latency) -> LatencyPlots:
    """By the minute of arrival, over the whole run."""
    minutes: dict[int, list[Served]] = {}
    for sequence in run.sequences:
        if sequence.finished_s is not None:
            minutes.setdefault(int(sequence.arrival_s // _MINUTE_S), []).append(sequence)
    ordered = [minutes[minute] for minute in sorted(minutes)]
    ttfts = [[(s.first_token_s or 0.0) - s.arrival_s for s in served] for served in ordered]
    tpots = [[1e3 * s.tpot_s for s in served] for served in ordered]
    return LatencyPlots(
        [(minute + 0.5) * _MINUTE_S for minute in sorted(minutes)],
        [percentile(values, 0.5) for values in ttfts],
        [percentile(values, 0.9) for values in ttfts],
        [percentile(values, 0.5) for values in tpots],
        [percentile(values, 0.9) for values in tpots],
        asdict(latency),
    )


def _e2e_s(sequence: Served) -> float:
    assert sequence.finished_s is not None
    return sequence.finished_s - sequence.arrival_s


def _met(sequence: Served, settings: TimedSettings, mean_prompt: int) -> tuple[bool, bool, bool, bool]:
    """First token, mean per token, 99% of gaps, going on after preemptions."""
    assert sequence.first_token_s is not None
    roofline, slo = settings.roofline, settings.slo

    def in_time(took_s: float, tokens: int) -> bool:
        return took_s <= slo.ttft * roofline.unloaded_ttft_s(max(tokens, mean_prompt))

    return (
        in_time(sequence.first_token_s - sequence.arrival_s, sequence.request.prompt_tokens),
        sequence.tpot_s <= slo.tpot * roofline.unloaded_tpot_s(1),
        sequence.slow_tokens <= 0.01 * sequence.request.output_tokens,
        all(in_time(gap_s, tokens) for gap_s, tokens in sequence.resumes),
    )


@dataclass(frozen=True, slots=True)
class Study:
    """What all runs that are compared share."""

    workload: Workload
    settings: TimedSettings
    window: Window
    make_driver: MakeDriver
    clock: NanosecondClock | None = None
    progress: Progress | None = None

    def run(self, name: str, policy: PolicySettings, log: DecisionLog | None = None) -> tuple[TimedRun, Latency]:
        """One run of a policy to its end, and its figures."""
        run = TimedRun(self.workload, self.settings, self.make_driver(name, policy), self.clock)
        run.log = log
        told = f"{name}, head-room {policy.head_room:g}, spares {self.settings.spares}"
        for now_s in run.run(self.window.until_s, DRAIN_S):
            if self.progress is not None:
                self.progress(told, now_s, self.window.until_s)
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


@dataclass(frozen=True, slots=True)
class Highest:
    """The highest load of a policy that met the objectives, as a multiple of the trace's rate; 0 if none did."""

    multiple: float
    head_room: float


def highest_load(
    study_at: Callable[[float], Study], name: str, head_rooms: Sequence[float] = HEAD_ROOMS, steps: int = 4
) -> Highest:
    """The dual, for every policy the same: the best head-room's highest rate on `settings.max_gpus`."""
    found = [Highest(highest_rate(study_at, name, PolicySettings(head_room=h), steps), h) for h in head_rooms]
    return max(found, key=lambda hit: hit.multiple)


_FIRST_MULTIPLE = 0.25
_LAST_MULTIPLE = 1024.0


def highest_rate(study_at: Callable[[float], Study], name: str, policy: PolicySettings, steps: int = 4) -> float:
    """The highest rate that meets the objectives, as a multiple. `study_at` gives the study at one; 0: none does.

    Doubled until it fails, which is cheaper than to begin far above, where everything waits; then `steps` bisections.
    """

    def met(multiple: float) -> bool:
        return study_at(multiple).run(name, policy)[1].attainment >= ATTAINMENT

    low, high = 0.0, _FIRST_MULTIPLE
    while high < _LAST_MULTIPLE and met(high):
        low, high = high, 2.0 * high
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if met(middle) else (low, middle)
    return low
