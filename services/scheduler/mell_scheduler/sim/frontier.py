"""The frontier as a plot: GPUs over the volume bound against tokens moved per second, in SVG."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 860, 420, 60, 44


@dataclass(frozen=True, slots=True)
class Point:
    """One policy at one setting."""

    name: str
    ratio: float
    moves_per_s: float
    moved_tokens_per_s: float
    preemptions: int


def frontier_svg(points: Sequence[Point]) -> str:
    """Fewer GPUs are lower, fewer tokens moved are further left: the best corner is bottom left."""
    right = max(p.moved_tokens_per_s for p in points) * 1.15 or 1.0
    top = max(p.ratio for p in points) * 1.01
    dial = sorted((p for p in points if p.name.startswith("repack ")), key=lambda p: p.moved_tokens_per_s)
    line = " ".join(f"{_x(p, right):.1f},{_y(p.ratio, top):.1f}" for p in dial if "(" not in p.name)
    marks = "".join(_mark(p, right, top) for p in points)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'font-family="system-ui,sans-serif" font-size="12">'
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>{_axes(right, top)}'
        f'<polyline points="{line}" fill="none" stroke="#1f6feb" stroke-width="1.5"/>{marks}</svg>\n'
    )


def _axes(right: float, top: float) -> str:
    parts = []
    for step in range(6):
        ratio = 1.0 + (top - 1.0) * step / 5
        tokens = right * step / 5
        y, x = _y(ratio, top), _LEFT + (_WIDTH - _LEFT - 20) * step / 5
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - 20}" y1="{y:.1f}" y2="{y:.1f}" stroke="#d0d7de"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{ratio:.3f}</text>')
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 24}" text-anchor="middle">{tokens:,.0f}</text>')
    parts.append(f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 6}" text-anchor="middle">tokens moved per second</text>')
    parts.append(f'<text x="{_LEFT - 50}" y="14">GPUs / volume bound</text>')
    return "".join(parts)


def _mark(point: Point, right: float, top: float) -> str:
    x, y = _x(point, right), _y(point.ratio, top)
    ours = point.name.startswith("repack")
    label = point.name.removeprefix("repack ") if ours else point.name
    near_right = x > _WIDTH - 260
    anchor, shift = ("end", -7) if near_right else ("start", 7)
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{"#1f6feb" if ours else "#d1242f"}"/>'
        f'<text x="{x + shift:.1f}" y="{y - 6:.1f}" text-anchor="{anchor}">{escape(label)}</text>'
    )


def _x(point: Point, right: float) -> float:
    return _LEFT + (_WIDTH - _LEFT - 20) * point.moved_tokens_per_s / right


def _y(ratio: float, top: float) -> float:
    return 24 + (_HEIGHT - 24 - _BOTTOM) * (top - ratio) / (top - 1.0)
