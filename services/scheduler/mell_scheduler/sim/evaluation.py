"""Regenerates the tables of the evaluation page: `python -m mell_scheduler.sim.evaluation docs/evaluation.md`.

The page's prose is written by hand; between `<!-- begin NAME -->` and `<!-- end NAME -->` stands what a
function here makes. With `--traces DIR` recorded traces there are replayed too.
"""

import argparse
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter_ns

from mell_scheduler.policy.base import BalanceSettings, PolicySettings, RepackSettings
from mell_scheduler.sim.frontier import Point, frontier_svg
from mell_scheduler.sim.hardware import capacity_tokens
from mell_scheduler.sim.memory import MemorySettings
from mell_scheduler.sim.report import PolicyFigures
from mell_scheduler.sim.requests import Scaling
from mell_scheduler.sim.roofline import Roofline
from mell_scheduler.sim.series import Window
from mell_scheduler.sim.simulate import Simulation, bare_policy, prepare, simulate
from mell_scheduler.sim.slo import Study, cheapest
from mell_scheduler.sim.timed import TimedSettings

RATES = ("0.5", "0.8", "1.1")
PAPER: dict[str, dict[str, str]] = {
    "llama-2-13b": {
        "best-fit": "33.6 / 53.2 / 75.0",
        "worst-fit": "34.1 / 53.0 / 73.2",
        "load-balance": "32.5 / 48.7 / 66.8",
        "mell": "29.4 / 43.0 / 56.9",
    },
    "llama-2-7b": {
        "best-fit": "32.4 / 41.1 / 51.4",
        "worst-fit": "29.6 / 37.0 / 45.5",
        "load-balance": "27.7 / 34.1 / 41.3",
        "mell": "24.7 / 29.8 / 35.4",
    },
}
"""GPUs, average over seconds 1000 to 5000, in MELL's tables."""
POLICIES = ("best-fit", "worst-fit", "load-balance", "load-balance-drain", "mell", "repack", "repack-frugal")
FRONTIER = (0.01, 0.02, 0.032, 0.045, 0.06, 0.08, 0.1, 0.13, 0.16, 0.2)
PREEMPTIONS_ALLOWED = 0.01
"""Per request: a baseline that preempts more is no service, and is not tuned to it."""
TUNED_HEAD_ROOMS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)


@dataclass(frozen=True, slots=True)
class Setting:
    """A trace, a capacity, a rate of growth and a window: what a memory-mode run needs."""

    trace: str
    capacity: int
    tokens_per_s: float
    window: Window
    seed: int = 0

    def run(self, name: str, settings: PolicySettings, move_s: float = 0.0) -> PolicyFigures:
        """One policy's figures."""
        simulation = Simulation(
            self.trace,
            MemorySettings(self.capacity, self.tokens_per_s, move_s=move_s),
            (name,),
            Scaling(seed=self.seed),
            self.window.warmup_s,
            self.window.until_s,
            settings,
        )
        return simulate(simulation, perf_counter_ns).outcomes[name].figures


RECON = Setting("paper:1.1", 15_500, 20.0, Window(600.0, 3_600.0))
RECORDED = (
    Setting("mooncake_conversation.csv.gz", 215_963, 33.0, Window(300.0, 3_400.0)),
    Setting("azure2023_conv.csv.gz", 4_300, 30.0, Window(300.0, 3_400.0)),
    Setting("mell_recon_x10_poisson1.1.csv.gz", 15_500, 20.0, Window(600.0, 3_600.0)),
    Setting("mell_recon_x10_poisson0.5.csv.gz", 15_500, 20.0, Window(600.0, 3_600.0)),
)


def paper_table(model: str, gpu: str) -> str:
    """The paper's GPU counts beside ours, for its three Poisson rates."""
    window = Window(1_000.0, 5_000.0)
    settings = [Setting(f"paper:{rate}", capacity_tokens(model, gpu), 20.0, window) for rate in RATES]
    rows = []
    for name in POLICIES:
        figures = [setting.run(name, PolicySettings()) for setting in settings]
        rows.append(
            (
                name,
                PAPER[model].get(name, ""),
                " / ".join(f"{f.gpu_mean:.1f}" for f in figures),
                " / ".join(f"{f.ratio:.3f}" for f in figures),
                " / ".join(f"{100 * f.memory_use:.0f}" for f in figures),
                " / ".join(f"{f.moves_per_s:.1f}" for f in figures),
                " / ".join(f"{f.moved_tokens_per_s:,.0f}" for f in figures),
                " / ".join(f"{f.preemptions:,}" for f in figures),
            )
        )
    heads = ("policy", "GPUs, paper", "GPUs, ours", "ratio", "use %", "moves/s", "tokens moved/s", "preemptions")
    return _markdown(heads, rows)


def frontier_points(setting: Setting) -> list[Point]:
    """Ratio against moves and tokens moved: repack along its dial, the others as they are and tuned."""
    points = []
    for head_room in FRONTIER:
        repack = RepackSettings(head_room=head_room, target_head_room=min(0.03 + head_room / 4, 0.1))
        points.append(_point(f"repack {head_room:g}", setting.run("repack", PolicySettings(repack=repack))))
    points.append(_point("repack (default)", setting.run("repack", PolicySettings())))
    points.append(_point("repack-frugal", setting.run("repack-frugal", PolicySettings())))
    points.append(_point("mell", setting.run("mell", PolicySettings())))
    name, figures = tuned_drain(setting)
    points.append(_point(name, figures))
    points.append(_point("load-balance", setting.run("load-balance", PolicySettings())))
    return points


def _point(name: str, figures: PolicyFigures) -> Point:
    return Point(name, figures.ratio, figures.moves_per_s, figures.moved_tokens_per_s, figures.preemptions)


def tuned_drain(setting: Setting) -> tuple[str, PolicyFigures]:
    """load-balance-drain with the thresholds that need fewest GPUs on this trace."""
    tried = []
    for high in (0.95, 1.0):
        for gap in (0.05, 0.3):
            for below in (0.93, 0.95, 0.97, 0.99):
                balance = BalanceSettings(high=high, gap=gap, drain_below=below)
                figures = setting.run("load-balance-drain", PolicySettings(balance=balance))
                tried.append((figures.gpu_mean, f"load-balance-drain, tuned ({high:g}, {gap:g}, {below:g})", figures))
    _, name, figures = min(tried, key=lambda t: t[0])
    return name, figures


def tuned_fit(setting: Setting, name: str) -> tuple[str, PolicyFigures] | None:
    """A baseline without migration, with the head-room that needs fewest GPUs and hardly preempts."""
    count = len(prepare(setting.trace, Scaling(seed=setting.seed), setting.capacity).requests)
    tried = [(h, setting.run(name, PolicySettings(head_room=h))) for h in TUNED_HEAD_ROOMS]
    serving = [(f.gpu_mean, h, f) for h, f in tried if f.preemptions <= PREEMPTIONS_ALLOWED * count]
    if not serving:
        return None
    _, head_room, figures = min(serving, key=lambda t: t[0])
    return f"{name}, head-room {head_room:g}", figures


def trace_table(setting: Setting) -> str:
    """Ours as they are, baselines as they are and tuned to this trace."""
    rows = [(name, setting.run(name, PolicySettings())) for name in POLICIES]
    rows += [tuned_drain(setting)]
    rows += [row for name in ("best-fit", "worst-fit") if (row := tuned_fit(setting, name)) is not None]
    return _markdown(_HEADS, [_cells(name, figures) for name, figures in rows])


def move_time_table(setting: Setting) -> str:
    """What holding the memory at both ends of a move for a second costs."""
    rows = [
        _cells(f"{name}, {move_s:g} s", setting.run(name, PolicySettings(), move_s))
        for name in ("repack", "repack-frugal", "mell", "load-balance-drain")
        for move_s in (0.0, 1.0)
    ]
    return _markdown(_HEADS, rows)


def equal_slo_table(model: str, gpu: str, seeds: Iterable[int]) -> str:
    """GPU-hours per hour at equal objectives, the same search for every policy; mean and range over seeds."""
    roofline = Roofline.of(model, gpu)
    window = Window(600.0, 1_500.0)
    found: dict[str, dict[int, tuple[float, str]]] = {}
    for seed in seeds:
        workload = prepare("paper:1.1", Scaling(seed=seed), roofline.capacity_tokens)
        study = Study(workload, TimedSettings(roofline), window, bare_policy)
        for name in ("repack", "best-fit", "worst-fit", "load-balance", "load-balance-drain", "mell"):
            hit = cheapest(study, name)
            if hit is not None:
                text = f"{hit.head_room:g}/{hit.spares} ({hit.latency.attainment:.1%})"
                found.setdefault(name, {})[seed] = (hit.latency.gpu_hours, text)
            else:
                found.setdefault(name, {})
    rows = [
        (
            name,
            _spread([hours for hours, _ in hits.values()]),
            _saved(found["repack"], hits),
            ", ".join(text for _, text in hits.values()) or "none on the grid meets the objectives",
        )
        for name, hits in found.items()
    ]
    heads = ("policy", "GPUs, mean (range)", "repack saves", "head-room/spares found (attained), per seed")
    return _markdown(heads, rows)


def _saved(ours: dict[int, tuple[float, str]], theirs: dict[int, tuple[float, str]]) -> str:
    """On the seeds on which both found a setting."""
    both = sorted(ours.keys() & theirs.keys())
    return f"{1 - _mean([ours[s][0] for s in both]) / _mean([theirs[s][0] for s in both]):.1%}" if both else ""


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _spread(values: list[float]) -> str:
    return f"{_mean(values):.2f} ({min(values):.2f} to {max(values):.2f})" if values else "-"


_HEADS = ("policy", "GPUs", "ratio", "use %", "moves/s", "tokens moved/s", "preemptions")


def _cells(name: str, figures: PolicyFigures) -> tuple[str, ...]:
    return (
        name,
        f"{figures.gpu_mean:.2f}",
        f"{figures.ratio:.4f}",
        f"{100 * figures.memory_use:.1f}",
        f"{figures.moves_per_s:.2f}",
        f"{figures.moved_tokens_per_s:,.0f}",
        f"{figures.preemptions:,}",
    )


def _markdown(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(heads)
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _frontier_block(page: Path) -> str:
    points = frontier_points(RECON)
    page.with_name("frontier.svg").write_text(frontier_svg(points))
    rows = [
        (p.name, f"{p.ratio:.4f}", f"{p.moves_per_s:.2f}", f"{p.moved_tokens_per_s:,.0f}", f"{p.preemptions:,}")
        for p in points
    ]
    table = _markdown(("policy", "ratio", "moves/s", "tokens moved/s", "preemptions"), rows)
    return f"![ratio against tokens moved](frontier.svg)\n\n{table}"


def _recorded_block(traces: Path) -> str:
    parts = []
    for setting in RECORDED:
        file = traces / setting.trace
        if file.exists():
            title = f"`{setting.trace}`, C = {setting.capacity:,}, {setting.tokens_per_s:g} tokens/s"
            parts.append(f"{title}\n\n{trace_table(replace(setting, trace=str(file)))}")
    return "\n\n".join(parts)


def blocks_of(page: Path, traces: Path | None, seeds: int) -> dict[str, Callable[[], str]]:
    """What makes each block of the page."""
    blocks: dict[str, Callable[[], str]] = {
        "paper-13b": lambda: paper_table("llama-2-13b", "a100-40"),
        "paper-7b": lambda: paper_table("llama-2-7b", "rtx-4090"),
        "frontier": lambda: _frontier_block(page),
        "move-s": lambda: move_time_table(RECON),
        "equal-slo": lambda: equal_slo_table("llama-2-13b", "a100-40", range(1, seeds + 1)),
    }
    if traces is not None:
        blocks["recorded"] = lambda: _recorded_block(traces)
    return blocks


def replace_block(text: str, name: str, content: str) -> str:
    """Put new content between a block's marks; raises ValueError if the page has no such block."""
    pattern = re.compile(rf"(<!-- begin {re.escape(name)} -->\n).*?(<!-- end {re.escape(name)} -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"the page has no block {name!r}: expected <!-- begin {name} --> and <!-- end {name} -->")
    return pattern.sub(lambda match: f"{match.group(1)}{content}\n{match.group(2)}", text)


def main() -> None:
    """Regenerate the blocks of a page."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("--traces", type=Path, help="a folder of recorded traces")
    parser.add_argument("--only", nargs="*", help="names of blocks; all by default")
    parser.add_argument("--seeds", type=int, default=5, help="of the search at equal objectives")
    options = parser.parse_args()
    for name, make in blocks_of(options.page, options.traces, options.seeds).items():
        if not options.only or name in options.only:
            content = make()
            options.page.write_text(replace_block(options.page.read_text(), name, content))


if __name__ == "__main__":
    main()
