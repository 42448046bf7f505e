"""What to send and when: lengths and start times, drawn from a seed or read from a trace. Pure but for the file."""

import csv
import gzip
import math
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TextIO

from mell_console.bench.settings import BenchSettings

_SYNTHETIC_REQUESTS = 100
_COLUMNS = ("arrival_s", "prompt_tokens", "output_tokens")


class TraceError(Exception):
    """A trace cannot be read; the message names the line and what is wrong."""


@dataclass(frozen=True, slots=True)
class Shot:
    """One request to send: its lengths, and its start after the first (None: when another ends)."""

    prompt_tokens: int
    output_tokens: int
    start_s: float | None = None


def plan_shots(settings: BenchSettings) -> Iterator[Shot]:
    """Return the requests of a run, endless if only time limits it; raises `TraceError`."""
    if settings.trace is not None:
        shots = read_trace(settings.trace, settings.speedup)
        return islice(shots, settings.requests or None)
    count = settings.requests or (None if settings.duration_s else _SYNTHETIC_REQUESTS)
    return islice(_synthetic(settings), count)


def read_trace(path: Path, speedup: float = 1.0) -> Iterator[Shot]:
    """Yield the rows of a trace, its first arrival moved to zero; rows must be in order of arrival."""
    try:
        with _open(path) as file:
            yield from _rows(path, csv.DictReader(file), speedup)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise TraceError(f"cannot read {path}: {error}") from error


def draw_length(random_source: random.Random, settings: BenchSettings, mean: int) -> int:
    """Return a length of at least 1 whose mean is `mean`."""
    if settings.lengths == "fixed":
        return mean
    # A lognormal's mean is exp(mu + sigma^2 / 2).
    mu = math.log(mean) - settings.spread**2 / 2
    return max(1, round(random_source.lognormvariate(mu, settings.spread)))


def _synthetic(settings: BenchSettings) -> Iterator[Shot]:
    lengths, gaps = random.Random(settings.seed), random.Random(settings.seed + 1)  # noqa: S311 - not for secrets
    start_s = 0.0
    while True:
        prompt = draw_length(lengths, settings, settings.prompt_tokens)
        output = draw_length(lengths, settings, settings.output_tokens)
        yield Shot(prompt, output, start_s if settings.rate else None)
        if settings.rate:
            uniform = settings.arrivals == "uniform"
            start_s += 1 / settings.rate if uniform else gaps.expovariate(settings.rate)


def _open(path: Path) -> TextIO:
    return gzip.open(path, "rt", newline="") if path.suffix == ".gz" else path.open(newline="")


def _rows(path: Path, rows: "csv.DictReader[str]", speedup: float) -> Iterator[Shot]:
    missing = [name for name in _COLUMNS if name not in (rows.fieldnames or ())]
    if missing:
        raise TraceError(f"{path} has no column {missing[0]}: its first line must be {','.join(_COLUMNS)}")
    first_s = last_s = math.nan
    for row in rows:
        shot = _shot(path, rows.line_num, row)
        assert shot.start_s is not None
        if math.isnan(first_s):
            first_s = last_s = shot.start_s
        if shot.start_s < last_s:
            raise TraceError(f"{path} line {rows.line_num}: arrives before the line above it")
        last_s = shot.start_s
        yield Shot(shot.prompt_tokens, shot.output_tokens, (last_s - first_s) / speedup)


def _shot(path: Path, line: int, row: dict[str, str]) -> Shot:
    try:
        arrival_s, prompt, output = float(row["arrival_s"]), int(row["prompt_tokens"]), int(row["output_tokens"])
    except (TypeError, ValueError) as error:
        raise TraceError(f"{path} line {line}: {error}") from error
    if not math.isfinite(arrival_s) or prompt < 1 or output < 1:
        raise TraceError(f"{path} line {line}: needs a finite arrival and lengths of at least 1")
    return Shot(prompt, output, arrival_s)
