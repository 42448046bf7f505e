"""From a run's series to the figures of the report, and those as JSON or as a table."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rich.table import Table

from mell_scheduler.sim.series import LatencyPlots, Series, Window, percentile, windowed


@dataclass(frozen=True, slots=True)
class PolicyFigures:
    """One policy's figures; means and sums are over the window. The fields are the JSON's keys."""

    gpu_mean: float
    gpu_peak: int
    gpu_seconds: float
    volume_bound_gpu_seconds: float
    """Sum over time of ceil(tokens held / capacity): no packing can use fewer."""
    ratio: float
    memory_use: float
    moves: int
    moves_per_s: float
    moved_tokens_per_s: float
    preemptions: int
    rejected: int
    """Requests left out because they would outgrow an empty GPU, and those never placed."""
    decision_p50_us: float
    decision_p99_us: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """One policy's run."""

    figures: PolicyFigures
    series: Series
    costs: dict[str, float]
    """What moves cost, by name: see `move_costs`."""
    latency: LatencyPlots | None = None
    """In timed mode."""


@dataclass(frozen=True, slots=True)
class Report:
    """What `mell simulate` found."""

    trace: str
    settings: dict[str, object]
    capacity_tokens: int
    excluded: dict[str, int]
    outcomes: dict[str, Outcome]

    def as_json(self) -> dict[str, object]:
        """The report's JSON: trace, settings, and figures by policy."""
        figures = {name: asdict(outcome.figures) for name, outcome in self.outcomes.items()}
        return {"trace": self.trace, "settings": self.settings, "policies": figures}


def figures_of(
    series: Series, window: Window, capacity_tokens: int, decision_ns: Sequence[int], rejected: int
) -> PolicyFigures:
    """Reduce a run to its figures. Samples are evenly spaced; paper.md's definitions."""
    cut = windowed(series, window)
    step_s = series.time_s[1] - series.time_s[0] if len(series.time_s) > 1 else 1.0
    length_s = max(step_s * len(cut.gpus), step_s)
    gpu_s = sum(cut.gpus) * step_s
    bound_s = sum(-(-tokens // capacity_tokens) for tokens in cut.tokens) * step_s
    return PolicyFigures(
        gpu_mean=gpu_s / length_s,
        gpu_peak=max(cut.gpus, default=0),
        gpu_seconds=gpu_s,
        volume_bound_gpu_seconds=bound_s,
        ratio=gpu_s / bound_s if bound_s else 1.0,
        memory_use=sum(cut.tokens) * step_s / (gpu_s * capacity_tokens) if gpu_s else 0.0,
        moves=sum(cut.moves),
        moves_per_s=sum(cut.moves) / length_s,
        moved_tokens_per_s=sum(cut.moved_tokens) / length_s,
        preemptions=sum(cut.preemptions),
        rejected=rejected,
        decision_p50_us=percentile(decision_ns, 0.5) / 1e3,
        decision_p99_us=percentile(decision_ns, 0.99) / 1e3,
    )


def move_costs(series: Series, window: Window, requests: int, kv_bytes_per_token: int | None) -> dict[str, float]:
    """Moves, bytes over links and tokens prefilled anew, per second and per request that arrived in the window."""
    cut = windowed(series, window)
    length_s = max(1e-9, window.until_s - window.warmup_s)
    totals = {"moves": sum(cut.moves), "moved_tokens": sum(cut.moved_tokens)}
    if kv_bytes_per_token is not None:
        totals["copied_bytes"] = kv_bytes_per_token * sum(cut.copied_tokens)
    totals["prefilled_tokens"] = sum(cut.prefilled_tokens)
    per_s = {f"{name}_per_s": total / length_s for name, total in totals.items() if name.startswith(("copied", "pre"))}
    return per_s | {f"{name}_per_request": total / max(1, requests) for name, total in totals.items()}


_COLUMNS = ("policy", "GPUs", "saved", "peak", "ratio", "use %", "moves/s", "tok/s", "preempt", "us p99")


def as_table(report: Report) -> Table:
    """One row per policy; the saving is against the policy that needs most GPUs."""
    table = Table(
        title=f"{report.trace}: GPUs needed, by policy", caption=_caption(report), box=None, padding=(0, 1, 0, 0)
    )
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column == "policy" else "right", no_wrap=True)
    most = max((o.figures.gpu_mean for o in report.outcomes.values()), default=0.0)
    for name, outcome in report.outcomes.items():
        table.add_row(name, *_cells(outcome.figures, most))
    return table


def _cells(figures: PolicyFigures, most: float) -> tuple[str, ...]:
    return (
        f"{figures.gpu_mean:.2f}",
        f"{1 - figures.gpu_mean / most:.1%}" if most else "",
        str(figures.gpu_peak),
        f"{figures.ratio:.3f}",
        f"{100 * figures.memory_use:.1f}",
        f"{figures.moves_per_s:.2f}",
        f"{figures.moved_tokens_per_s:,.0f}",
        f"{figures.preemptions:,}",
        f"{figures.decision_p99_us:,.0f}",
    )


def _caption(report: Report) -> str:
    notes = ["ratio: GPUs over the volume bound, which no packing can beat; tok/s: tokens moved"]
    notes += [f"left out, {why}: {count:,} requests" for why, count in report.excluded.items()]
    return "; ".join(notes)
