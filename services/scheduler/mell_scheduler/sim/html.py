"""The report as one self-contained HTML page: a table and plots drawn in SVG, no scripts, no fonts."""

from collections.abc import Sequence
from dataclasses import fields
from html import escape

from mell_scheduler.sim.report import PolicyFigures, Report

_COLOURS = ("#1f6feb", "#d1242f", "#1a7f37", "#9a6700", "#8250df", "#57606a", "#bf3989", "#0a7a8a", "#6e4a1f")
_WIDTH, _HEIGHT, _MARGIN = 920, 260, 52
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
    ]
    title = escape(f"{report.trace}: GPUs by policy")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>'
        f"<h1>{title}</h1>{_table(report)}{_key(report)}{''.join(plots)}{_settings(report)}</body></html>\n"
    )


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
    names = [field.name for field in fields(PolicyFigures)]
    head = "".join(f"<th>{escape(name.replace('_', ' '))}</th>" for name in names)
    rows = "".join(
        f"<tr><td>{escape(policy)}</td>"
        + "".join(f"<td>{_number(getattr(outcome.figures, name))}</td>" for name in names)
        + "</tr>"
        for policy, outcome in report.outcomes.items()
    )
    return f"<table><thead><tr><th>policy</th>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _key(report: Report) -> str:
    items = "".join(
        f'<span><i style="background:{_colour(at)}"></i>{escape(name)}</span>'
        for at, name in enumerate(report.outcomes)
    )
    return f'<p class="key">{items}</p>'


def _plot(title: str, time_s: Sequence[float], lines: dict[str, list[float]]) -> str:
    top = max((max(values, default=0.0) for values in lines.values()), default=0.0) or 1.0
    end_s = max(time_s[-1], 1.0)
    paths = "".join(
        f'<polyline fill="none" stroke="{_colour(at)}" stroke-width="1.5"'
        f' points="{_points(time_s, values, end_s, top)}"/>'
        for at, values in enumerate(lines.values())
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
        x = _x(end_s * step / 4, end_s)
        anchor = "start" if step == 0 else "end" if step == 4 else "middle"
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 6}" text-anchor="{anchor}">{_number(end_s * step / 4)} s</text>')
    return "".join(parts)


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
