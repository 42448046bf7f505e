"""Runs a workload against policies in memory mode: the plain function behind `mell simulate`."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace

from mell_scheduler.policy import PolicySettings, make_policy
from mell_scheduler.sim.core_driver import CoreDriver
from mell_scheduler.sim.driver import Driver, PolicyDriver
from mell_scheduler.sim.memory import DecisionLog, MemoryRun, MemorySettings, NanosecondClock
from mell_scheduler.sim.paper import paper_workload
from mell_scheduler.sim.report import Outcome, Report, figures_of, move_costs
from mell_scheduler.sim.requests import US_PER_S, Scaling, Workload, scaled, without_oversized
from mell_scheduler.sim.series import Progress, Window, arrivals_in
from mell_scheduler.sim.trace import TraceError, read_trace

MakeDriver = Callable[[str, PolicySettings], Driver]

DEFAULT_POLICIES = ("repack", "load-balance-drain", "load-balance", "best-fit", "worst-fit")


@dataclass(frozen=True, slots=True)
class Simulation:
    """All that fixes a run's outcome; decision times excepted, equal simulations give equal reports."""

    trace: str
    memory: MemorySettings
    policies: tuple[str, ...] = DEFAULT_POLICIES
    scaling: Scaling = field(default_factory=Scaling)
    warmup_s: float = 0.0
    until_s: float | None = None
    """None: up to the last arrival."""
    policy_settings: PolicySettings = field(default_factory=PolicySettings)
    kv_bytes_per_token: int | None = None
    """Of the model, to count what moves would copy; None: not counted."""


def load(trace: str, seed: int) -> Workload:
    """Read a trace, or sample `paper:RATE`; raises TraceError."""
    if not trace.startswith("paper:"):
        return read_trace(trace)
    try:
        rate_per_s = float(trace.removeprefix("paper:"))
    except ValueError:
        rate_per_s = 0.0
    if not 0.0 < rate_per_s < 1e6:
        raise TraceError(f"{trace!r}: expected paper:RATE with a rate in requests per second, as paper:1.1")
    return paper_workload(rate_per_s, seed)


def prepare(trace: str, scaling: Scaling, capacity_tokens: int) -> Workload:
    """Load and scale a trace, without what no GPU could hold; raises TraceError."""
    workload = without_oversized(scaled(load(trace, scaling.seed), scaling), capacity_tokens)
    if not workload.requests:
        raise TraceError(
            f"{workload.name}: every request is over the capacity of {capacity_tokens:,} tokens:"
            " raise --capacity-tokens"
        )
    return workload


def window_of(workload: Workload, warmup_s: float, until_s: float | None) -> Window:
    """The window of a run; without `until_s` up to the last arrival. Raises TraceError if it is empty."""
    end_s = until_s or workload.requests[-1].arrival_us / US_PER_S + 1.0
    if warmup_s >= end_s:
        raise TraceError(f"the warm-up of {warmup_s:g} s leaves nothing of {end_s:g} s: lower --warmup-s")
    return Window(warmup_s, end_s)


def bare_policy(name: str, settings: PolicySettings) -> Driver:
    """The policy alone, without the live core around it."""
    return PolicyDriver(make_policy(name, settings))


def live_core(epoch_s: float, growth_blocks: int | None = None) -> MakeDriver:
    """The policy inside the scheduler core that also runs live; `growth_blocks` as in `CoreDriver`."""

    def make(name: str, settings: PolicySettings) -> Driver:
        return CoreDriver(name, settings, growth_blocks, round(epoch_s * US_PER_S))

    return make


def simulate(
    simulation: Simulation,
    clock: NanosecondClock,
    progress: Progress | None = None,
    log: DecisionLog | None = None,
    make_driver: MakeDriver = bare_policy,
) -> Report:
    """Replay the trace against each policy; raises TraceError, ValueError for an unknown policy."""
    workload = prepare(simulation.trace, simulation.scaling, simulation.memory.capacity_tokens)
    window = window_of(workload, simulation.warmup_s, simulation.until_s)
    until_s = window.until_s
    settings = replace(simulation.policy_settings, hold_both_ends=simulation.memory.move_s > 0)
    outcomes = {}
    for name in simulation.policies:
        run = MemoryRun(workload, simulation.memory, make_driver(name, settings), clock)
        run.log = None if log is None else tagged(log, name)
        for now_s in run.run(until_s):
            if progress is not None:
                progress(name, now_s, until_s)
        outcomes[name] = _outcome(run, window, workload, simulation.kv_bytes_per_token)
    capacity = simulation.memory.capacity_tokens
    return Report(workload.name, _settings(simulation, settings, until_s), capacity, workload.excluded, outcomes)


def _outcome(run: MemoryRun, window: Window, workload: Workload, kv_bytes_per_token: int | None) -> Outcome:
    rejected = workload.excluded.get("over capacity", 0) + run.series.waiting[-1]
    figures = figures_of(run.series, window, run.settings.capacity_tokens, run.decision_ns, rejected)
    arrived = arrivals_in(window, (request.arrival_us for request in workload.requests))
    return Outcome(figures, run.series, move_costs(run.series, window, arrived, kv_bytes_per_token))


def tagged(log: DecisionLog, policy: str) -> DecisionLog:
    """The log with each record's policy in front."""

    def write(record: dict[str, object]) -> None:
        log({"policy": policy, **record})

    return write


def _settings(simulation: Simulation, policy: PolicySettings, until_s: float) -> dict[str, object]:
    return {
        "mode": "memory",
        **asdict(simulation.memory),
        "kv_bytes_per_token": simulation.kv_bytes_per_token,
        "scaling": asdict(simulation.scaling),
        "warmup_s": simulation.warmup_s,
        "until_s": until_s,
        "policy": asdict(policy),
    }
