"""Runs a workload against policies in timed mode: figures as in memory mode, and latency beside them."""

from dataclasses import asdict, dataclass, field, replace

from rich.table import Table

from mell_scheduler.policy import PolicySettings
from mell_scheduler.sim.memory import DecisionLog, NanosecondClock
from mell_scheduler.sim.report import Outcome, Report, figures_of, move_costs
from mell_scheduler.sim.requests import Scaling
from mell_scheduler.sim.series import Progress, Window, arrivals_in
from mell_scheduler.sim.simulate import MakeDriver, bare_policy, prepare, tagged, window_of
from mell_scheduler.sim.slo import Found, Highest, Latency, Study, cheapest, highest_load, latency_plots
from mell_scheduler.sim.timed import TimedSettings


@dataclass(frozen=True, slots=True)
class TimedSimulation:
    """All that fixes a timed run's outcome."""

    trace: str
    timed: TimedSettings
    policies: tuple[str, ...]
    scaling: Scaling = field(default_factory=Scaling)
    warmup_s: float = 0.0
    until_s: float | None = None
    policy_settings: PolicySettings = field(default_factory=PolicySettings)
    equal_slo: bool = False
    """Search head-room and spares for the fewest GPU-hours, for every policy the same."""
    gpus: int | None = None
    """With `equal_slo`: so many GPUs, always on, and the search is for the highest rate that they serve."""


@dataclass(frozen=True, slots=True)
class TimedReport:
    """Figures by policy, and latency by policy; `found` says with which setting, if it was searched."""

    report: Report
    latency: dict[str, Latency]
    found: dict[str, Found | None]
    highest: dict[str, Highest] = field(default_factory=dict)

    def as_json(self) -> dict[str, object]:
        """The report's JSON with one key more, `timed`."""
        timed: dict[str, object] = {}
        for name, latency in self.latency.items():
            found = self.found.get(name)
            chosen = {"head_room": found.head_room, "spares": found.spares} if found else None
            highest = self.highest.get(name)
            most = {"rate_multiple": highest.multiple, "head_room": highest.head_room} if highest else None
            costs = self.report.outcomes[name].costs
            timed[name] = {**asdict(latency), **costs, "chosen": chosen, "highest_rate": most}
        missed = [name for name, found in self.found.items() if found is None]
        return {**self.report.as_json(), "timed": timed, "missed_objectives": missed}


def simulate_timed(
    simulation: TimedSimulation,
    progress: Progress | None = None,
    make_driver: MakeDriver = bare_policy,
    clock: NanosecondClock | None = None,
    log: DecisionLog | None = None,
) -> TimedReport:
    """Replay the trace against each policy; raises TraceError, ValueError for an unknown policy."""
    capacity = simulation.timed.roofline.capacity_tokens
    workload = prepare(simulation.trace, simulation.scaling, capacity)
    window = window_of(workload, simulation.warmup_s, simulation.until_s)
    study = Study(workload, simulation.timed, window, make_driver, clock, progress)
    outcomes, latencies, found, highest = {}, {}, {}, {}
    for name in simulation.policies:
        settings, chosen = simulation.policy_settings, study
        if simulation.equal_slo and simulation.gpus is not None:
            most = highest[name] = highest_load(lambda multiple: _study_at(simulation, study, multiple), name)
            settings = PolicySettings(head_room=most.head_room)
            chosen = _study_at(simulation, study, most.multiple or 1.0)
        elif simulation.equal_slo:
            hit = found[name] = cheapest(study, name)
            if hit is not None:
                settings, chosen = PolicySettings(head_room=hit.head_room), study.with_spares(hit.spares)
        run, latency = chosen.run(name, settings, None if log is None else tagged(log, name))
        latencies[name] = latency
        rejected = workload.excluded.get("over capacity", 0)
        figures = figures_of(run.series, chosen.window, capacity, run.decision_ns, rejected)
        arrived = arrivals_in(chosen.window, (request.arrival_us for request in chosen.workload.requests))
        kv_bytes = simulation.timed.roofline.model.kv_bytes_per_token
        costs = move_costs(run.series, chosen.window, arrived, kv_bytes)
        outcomes[name] = Outcome(figures, run.series, costs, latency_plots(run, latency))
    report = Report(workload.name, _settings(simulation, window.until_s), capacity, workload.excluded, outcomes)
    return TimedReport(report, latencies, found, highest)


def _study_at(simulation: TimedSimulation, study: Study, multiple: float) -> Study:
    """The same at another rate, on a fixed number of GPUs that are all warm from the start.

    `paper:RATE` is sampled at that rate; a trace is replayed faster, and the window shrinks with it.
    """
    settings = replace(study.settings, max_gpus=simulation.gpus, spares=simulation.gpus or 0)
    capacity = study.settings.roofline.capacity_tokens
    trace, scaling, window = simulation.trace, simulation.scaling, study.window
    if trace.startswith("paper:"):
        trace = f"paper:{float(trace.removeprefix('paper:')) * multiple:g}"
    else:
        scaling = replace(scaling, time=scaling.time / multiple)
        window = Window(window.warmup_s / multiple, window.until_s / multiple)
    return replace(study, workload=prepare(trace, scaling, capacity), window=window, settings=settings)


def _settings(simulation: TimedSimulation, until_s: float) -> dict[str, object]:
    values = asdict(simulation)
    values.pop("policies")
    values.pop("trace")
    return {"mode": "timed", **values, "until_s": until_s}


_COLUMNS = ("policy", "GPUs", "met", "TTFT p50", "p99", "TPOT p50", "p99", "moves/s", "preempt")


def as_timed_table(timed: TimedReport) -> Table:
    """One row per policy: GPU-hours per hour, share of requests that met the objectives, seconds and ms."""
    caption = "met: requests within all objectives; TTFT in s, TPOT in ms"
    missed = [name for name, found in timed.found.items() if found is None]
    if missed:
        caption += f"; no setting on the grid met 99%: {', '.join(missed)}"
    for name, highest in timed.highest.items():
        caption += f"; {name}: up to {highest.multiple:.2f} times the rate (head-room {highest.head_room:g})"
    table = Table(title=f"{timed.report.trace}: GPUs and latency", caption=caption, box=None, padding=(0, 1, 0, 0))
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column == "policy" else "right", no_wrap=True)
    for name, latency in timed.latency.items():
        table.add_row(name, *_cells(latency))
    return table


def _cells(latency: Latency) -> tuple[str, ...]:
    return (
        f"{latency.gpu_hours:.2f}",
        f"{latency.attainment:.1%}",
        f"{latency.ttft_p50_s:.2f}",
        f"{latency.ttft_p99_s:.2f}",
        f"{1e3 * latency.tpot_p50_s:.1f}",
        f"{1e3 * latency.tpot_p99_s:.1f}",
        f"{latency.moves_per_s:.2f}",
        f"{latency.preemptions:,}",
    )
