"""Reads traces: our CSV, Azure's CSV, Mooncake's JSON lines; gzip or not; a file or standard input.

A bad row ends the reading with a `TraceError` that says file, line, column and what was expected.
"""

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path

from mell_scheduler.sim.requests import US_PER_S, Request, Workload

_GZIP_MAGIC = b"\x1f\x8b"
_LONGEST_US = 366 * 24 * 3600 * US_PER_S
"""A trace that spans more than a year most likely has its times in another unit."""


class TraceError(Exception):
    """A trace that cannot be used; the message is for the user."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where in a trace an error is."""

    name: str
    line: int

    def error(self, column: str, expected: str, got: object) -> TraceError:
        return TraceError(f"{self.name}, line {self.line}, column {column}: expected {expected}, got {got!r}")


@dataclass(frozen=True, slots=True)
class _Row:
    """A request, and where and how its arrival was written."""

    place: _Place
    arrival_column: str
    arrival: str
    request: Request

    def misplaced(self, expected: str) -> TraceError:
        return self.place.error(self.arrival_column, expected, self.arrival)


@dataclass(frozen=True, slots=True)
class _Columns:
    """A CSV dialect: the names of its columns, and how its times read."""

    arrival: str
    prompt: str
    output: str
    time_us: Callable[[str], int]
    time_format: str


def _seconds(text: str) -> int:
    return round(float(text) * US_PER_S)


def _timestamp(text: str) -> int:
    """Azure writes seven digits of a second; Python reads six."""
    head, _, tail = text.strip().partition(".")
    digits = tail[: len(tail) - len(tail.lstrip("0123456789"))]
    zone = tail[len(digits) :]
    moment = datetime.fromisoformat(f"{head}{zone}")
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return int(moment.timestamp()) * US_PER_S + round(float(f"0.{digits or 0}") * US_PER_S)


_DIALECTS = (
    _Columns("arrival_s", "prompt_tokens", "output_tokens", _seconds, "seconds, as 12.5"),
    _Columns("TIMESTAMP", "ContextTokens", "GeneratedTokens", _timestamp, "a time, as 2023-11-16 18:15:46.68"),
)


def read_trace(source: str) -> Workload:
    """Read a trace from a path, or from standard input if `source` is "-"; raises TraceError."""
    name = "standard input" if source == "-" else source
    try:
        data = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
        if data.startswith(_GZIP_MAGIC):
            data = gzip.decompress(data)
        text = data.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise TraceError(f"cannot read {name}: {error}") from error
    label = "-" if source == "-" else Path(source).name
    return _workload(label, name, parse_rows(name, text))


def parse_rows(name: str, text: str) -> Iterator[_Row]:
    """Recognise the format by its first line and yield its rows; raises TraceError."""
    first = text.lstrip().partition("\n")[0].strip()
    if not first:
        raise TraceError(f"{name} is empty: expected a header line and one row per request")
    if first.startswith("{"):
        return _mooncake_rows(name, text)
    header = _header(name, first)
    for columns in _DIALECTS:
        if {columns.arrival, columns.prompt, columns.output} <= set(header):
            return _csv_rows(name, text, columns)
    raise _Place(name, 1).error(
        "header", "arrival_s,prompt_tokens,output_tokens or TIMESTAMP,ContextTokens,GeneratedTokens", first
    )


def _header(name: str, line: str) -> list[str]:
    try:
        return [column.strip() for column in next(csv.reader([line]))]
    except csv.Error as error:
        raise TraceError(f"{name}, line 1: not valid CSV: {error}") from error


def _csv_rows(name: str, text: str, columns: _Columns) -> Iterator[_Row]:
    reader = csv.reader(io.StringIO(text.lstrip(), newline=""), strict=True)
    try:
        header = [column.strip() for column in next(reader)]
        wanted = [header.index(c) for c in (columns.arrival, columns.prompt, columns.output)]
        for row in reader:
            if row:
                yield _csv_row(_Place(name, reader.line_num), row, wanted, columns)
    except csv.Error as error:
        raise TraceError(f"{name}, line {reader.line_num}: not valid CSV: {error}") from error


def _csv_row(place: _Place, row: list[str], wanted: list[int], columns: _Columns) -> _Row:
    names = (columns.arrival, columns.prompt, columns.output)
    for column, at in zip(names, wanted, strict=True):
        if at >= len(row):
            raise place.error(column, "a value", "end of line")
    arrival, prompt, output = (row[at] for at in wanted)
    try:
        arrival_us = columns.time_us(arrival)
    except (ValueError, OverflowError):
        raise place.error(columns.arrival, columns.time_format, arrival) from None
    request = Request(arrival_us, _tokens(place, columns.prompt, prompt), _tokens(place, columns.output, output))
    return _Row(place, columns.arrival, arrival, request)


def _tokens(place: _Place, column: str, value: object) -> int:
    """A count of tokens: a whole number, not negative; raises TraceError."""
    try:
        count = int(value) if isinstance(value, str) else value
    except ValueError:
        count = None
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise place.error(column, "a whole number of tokens, not negative", value)
    return count


def _mooncake_rows(name: str, text: str) -> Iterator[_Row]:
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            place = _Place(name, number)
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                raise place.error("1", "a JSON object", line[:60]) from None
            yield _mooncake_row(place, record)


def _mooncake_row(place: _Place, record: object) -> _Row:
    if not isinstance(record, dict):
        raise place.error("1", "a JSON object", record)
    timestamp = record.get("timestamp")
    if not isinstance(timestamp, int | float) or isinstance(timestamp, bool) or not isfinite(timestamp):
        raise place.error("timestamp", "milliseconds", timestamp)
    hash_ids = record.get("hash_ids", [])
    if not isinstance(hash_ids, list) or not all(isinstance(h, int) for h in hash_ids):
        raise place.error("hash_ids", "a list of whole numbers", hash_ids)
    prompt = _tokens(place, "input_length", record.get("input_length"))
    output = _tokens(place, "output_length", record.get("output_length"))
    return _Row(place, "timestamp", str(timestamp), Request(round(timestamp * 1000), prompt, output, tuple(hash_ids)))


def _workload(label: str, name: str, rows: Iterator[_Row]) -> Workload:
    """Arrivals from zero; rows out of order are an error, requests without tokens are counted and left out."""
    requests: list[Request] = []
    start_us: int | None = None
    previous_us = zero = 0
    for row in rows:
        start_us = row.request.arrival_us if start_us is None else start_us
        arrival_us = row.request.arrival_us - start_us
        if arrival_us < previous_us:
            raise row.misplaced("a time not before the row above (sort the trace)")
        if arrival_us > _LONGEST_US:
            raise row.misplaced("a time within a year of the first row (in another unit?)")
        previous_us = arrival_us
        if row.request.prompt_tokens and row.request.output_tokens:
            requests.append(replace(row.request, arrival_us=arrival_us))
        else:
            zero += 1
    if not requests:
        raise TraceError(f"{name} holds no request with tokens: expected one row per request")
    return Workload(label, requests, {"no prompt or no output": zero} if zero else {})
