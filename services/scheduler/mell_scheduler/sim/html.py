"""The report as one self-contained HTML page: a table and plots drawn in SVG, no scripts, no fonts."""

from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from math import floor, log10

from mell_scheduler.sim.report import Report

_COLOURS = ("#1f6feb", "#d1242f", "#1a7f37", "#9a6700", "#8250df", "#57606a", "#bf3989", "#0a7a8a", "#6e4a1f")
_WIDTH, _HEIGHT, _MARGIN = 920, 260, 74
_POINTS = 460

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:980px;margin:2rem auto;padding:0 1rem;color:#1f2328;background:#fff}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;display:block;overflow-x:auto}
th,td{text-align:right;padding:.3rem .6rem;border-bottom:1px solid #d0d7de;white-space:nowrap}
th:first-child,td:first-child{text-align:left}
svg{width:100%;height:auto;font:12px system-ui,sans-serif}
.key span{display:inline-block;margin-right:1.2rem}
.key i{display:inline-block;width:.8rem;height:.8rem;margin-right:.35rem;border-radius:2px}
details{margin:1rem 0}
"""


def as_html(report: Report) -> str:
    """The whole page."""
    time_s = next(iter(report.outcomes.values())).series.time_s
    plots = [
        _plot("GPUs in use", time_s, {n: [float(v) for v in o.series.gpus] for n, o in report.outcomes.items()}),
        _plot("Memory use of those GPUs, %", time_s, _memory_use(report)),
        _plot("Moves, total", time_s, {n: _summed(o.series.moves) for n, o in report.outcomes.items()}),
        _plot("Tokens moved, total", time_s, {n: _summed(o.series.moved_tokens) for n, o in report.outcomes.items()}),
        _plot("Preemptions, total", time_s, {n: _summed(o.series.preemptions) for n, o in report.outcomes.items()}),
        *_latency_plots(report, time_s[-1]),
    ]
    title = escape(f"{report.trace}: GPUs by policy")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>'
        f"<h1>{title}</h1>{_table(report)}{_latency_table(report)}{_key(report)}{''.join(plots)}{_settings(report)}</body></html>\n"
    )


def as_svg(title: str, lines: dict[str, tuple[Sequence[float], Sequence[float]]]) -> str:
    """One plot as a file of its own: times and values of each line by its name, and a key."""
    top = _rounded_up(max((max(values, default=0.0) for _, values in lines.values()), default=0.0) or 1.0)
    end_s = max([1.0, *(time_s[-1] for time_s, _ in lines.values() if time_s)])
    paths = "".join(
        f'<polyline fill="none" stroke="{_colour(at)}" stroke-width="1.5"'
        f' points="{_points(time_s, values, end_s, top)}"/>'
        for at, (time_s, values) in enumerate(lines.values())
    )
    words = "".join(
        f'<text x="{_MARGIN + at * 150}" y="{_HEIGHT + 16}" fill="{_colour(at)}">{escape(name)}</text>'
        for at, name in enumerate(lines)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT + 24}" '
        f'font-family="system-ui,sans-serif" font-size="12"><title>{escape(title)}</title>'
        f'<rect width="{_WIDTH}" height="{_HEIGHT + 24}" fill="#fff"/>{_axes(end_s, top)}{paths}{words}</svg>\n'
    )


_LATENCIES = (
    ("Time to first token, median of a minute's arrivals, s", "ttft_p50_s"),
    ("Time to first token, 90% of a minute's arrivals, s", "ttft_p90_s"),
    ("Time per output token, median of a minute's arrivals, ms", "tpot_p50_ms"),
    ("Time per output token, 90% of a minute's arrivals, ms", "tpot_p90_ms"),
)


def _latency_plots(report: Report, end_s: float) -> list[str]:
    """Of timed runs, on the time axis of the other plots."""
    lines = {n: o.latency for n, o in report.outcomes.items() if o.latency is not None}
    if not lines:
        return []
    return [
        _chart(title, end_s, [(at.time_s, getattr(at, name)) for at in lines.values()]) for title, name in _LATENCIES
    ]


def _latency_table(report: Report) -> str:
    rows = {n: o.latency.rows for n, o in report.outcomes.items() if o.latency is not None}
    return _rows(list(next(iter(rows.values()))), rows) if rows else ""


def _memory_use(report: Report) -> dict[str, list[float]]:
    capacity = report.capacity_tokens
    return {
        name: [100.0 * t / (g * capacity) if g else 0.0 for t, g in zip(o.series.tokens, o.series.gpus, strict=True)]
        for name, o in report.outcomes.items()
    }


def _summed(values: Sequence[int]) -> list[float]:
    total, out = 0, []
    for value in values:
        total += value
        out.append(float(total))
    return out


def _table(report: Report) -> str:
    values = {name: asdict(outcome.figures) | outcome.costs for name, outcome in report.outcomes.items()}
    return _rows(list(next(iter(values.values()))), values)


def _rows(names: Sequence[str], values: dict[str, dict[str, float]]) -> str:
    head = "".join(f"<th>{escape(policy)}</th>" for policy in values)
    rows = "".join(
        f"<tr><td>{escape(name.replace('_', ' '))}</td>"
        + "".join(f"<td>{_number(row[name])}</td>" for row in values.values())
        + "</tr>"
        for name in names
    )
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _key(report: Report) -> str:
    items = "".join(
        f'<span><i style="background:{_colour(at)}"></i>{escape(name)}</span>'
        for at, name in enumerate(report.outcomes)
    )
    return f'<p class="key">{items}</p>'


def _plot(title: str, time_s: Sequence[float], lines: dict[str, list[float]]) -> str:
    return _chart(title, time_s[-1], [(time_s, values) for values in lines.values()])


def _chart(title: str, end_s: float, lines: Sequence[tuple[Sequence[float], Sequence[float]]]) -> str:
    """One line per policy: times and values."""
    top = max((max(values, default=0.0) for _, values in lines), default=0.0) or 1.0
    top, end_s = _rounded_up(top), max(end_s, 1.0)
    paths = "".join(
        f'<polyline fill="none" stroke="{_colour(at)}" stroke-width="1.5"'
        f' points="{_points(time_s, values, end_s, top)}"/>'
        for at, (time_s, values) in enumerate(lines)
    )
    return (
        f"<h2>{escape(title)}</h2>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{_axes(end_s, top)}{paths}</svg>"
    )


def _axes(end_s: float, top: float) -> str:
    parts = []
    for step in range(5):
        y = _y(top * step / 4, top)
        parts.append(f'<line x1="{_MARGIN}" x2="{_WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#d0d7de"/>')
        parts.append(f'<text x="{_MARGIN - 6}" y="{y + 4:.1f}" text-anchor="end">{_number(top * step / 4)}</text>')
    between_s = _rounded_up(end_s / 8)
    for step in range(int(end_s / between_s) + 1):
        x = _x(step * between_s, end_s)
        anchor = "start" if step == 0 else "end" if x > _WIDTH - 20 else "middle"
        text = f"{_number(step * between_s)} s"
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 6}" text-anchor="{anchor}">{text}</text>')
    return "".join(parts)


def _rounded_up(value: float) -> float:
    """The next number that is easy to read and to quarter."""
    power = 10.0 ** floor(log10(value))
    return next(step * power for step in (1.0, 2.0, 4.0, 6.0, 8.0, 10.0) if value <= step * power * (1.0 + 1e-9))


def _points(time_s: Sequence[float], values: Sequence[float], end_s: float, top: float) -> str:
    every = max(1, len(values) // _POINTS)
    return " ".join(f"{_x(time_s[at], end_s):.1f},{_y(values[at], top):.1f}" for at in range(0, len(values), every))


def _x(time_s: float, end_s: float) -> float:
    return _MARGIN + (_WIDTH - _MARGIN) * time_s / end_s


def _y(value: float, top: float) -> float:
    return 10 + (_HEIGHT - 40) * (1.0 - value / top)


def _colour(at: int) -> str:
    return _COLOURS[at % len(_COLOURS)]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"


def _settings(report: Report) -> str:
    rows = "".join(f"<tr><td>{escape(k)}</td><td>{escape(str(v))}</td></tr>" for k, v in report.settings.items())
    return f"<details><summary>Settings</summary><table>{rows}</table></details>"
