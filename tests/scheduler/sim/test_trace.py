"""Every format the simulator reads, and every way a trace can be wrong."""

import gzip
import io
import sys
from pathlib import Path

import pytest

from mell_scheduler.sim.paper import paper_workload
from mell_scheduler.sim.requests import Request, Scaling, Workload, scaled, without_oversized
from mell_scheduler.sim.trace import TraceError, read_trace

OURS = "arrival_s,prompt_tokens,output_tokens,session\n0.5,10,20,1\n2.25,30,40,2\n"
AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
)
AZURE_2024 = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2024-05-10 00:00:00.009930+00:00,2162,5\n"
    "2024-05-10 00:00:01+00:00,2399,6\n"
)
MOONCAKE = (
    '{"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47]}\n'
    '{"timestamp": 30535, "input_length": 6472, "output_length": 26, "hash_ids": [46, 49]}\n'
)
EXPECTED = {
    OURS: [Request(0, 10, 20), Request(1_750_000, 30, 40)],
    AZURE: [Request(0, 374, 44), Request(4_314_579, 396, 109)],
    AZURE_2024: [Request(0, 2162, 5), Request(990_070, 2399, 6)],
    MOONCAKE: [Request(0, 6955, 52, (46, 47)), Request(3_053_000, 6472, 26, (46, 49))],
}


@pytest.mark.parametrize("text", EXPECTED, ids=["ours", "azure", "azure 2024", "mooncake"])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_formats_are_recognised(tmp_path: Path, text: str, packed: bool) -> None:
    """Each format is known by its first line, packed or not, and arrivals count from zero."""
    file = tmp_path / "trace"
    file.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    assert list(read_trace(str(file)).requests) == EXPECTED[text]


def test_standard_input_is_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dash reads standard input."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(OURS.encode())))
    assert list(read_trace("-").requests) == EXPECTED[OURS]


BAD = {
    "": "is empty",
    "\n\n": "is empty",
    "a,b,c\n1,2,3\n": "line 1, column header: expected arrival_s,prompt_tokens,output_tokens",
    "arrival_s,prompt_tokens,output_tokens\n": "holds no request",
    "arrival_s,prompt_tokens,output_tokens\n0,1,1\n0,-5,1\n": "line 3, column prompt_tokens: expected a whole",
    "arrival_s,prompt_tokens,output_tokens\n0,1,many\n": "line 2, column output_tokens: expected a whole",
    "arrival_s,prompt_tokens,output_tokens\n0,1.5,1\n": "line 2, column prompt_tokens: .* got '1.5'",
    "arrival_s,prompt_tokens,output_tokens\n0,1\n": "line 2, column output_tokens: expected a value",
    "arrival_s,prompt_tokens,output_tokens\nsoon,1,1\n": "line 2, column arrival_s: expected seconds",
    "arrival_s,prompt_tokens,output_tokens\nnan,1,1\n": "line 2, column arrival_s: expected seconds",
    "arrival_s,prompt_tokens,output_tokens\ninf,1,1\n": "line 2, column arrival_s: expected seconds",
    "arrival_s,prompt_tokens,output_tokens\n5,1,1\n4,1,1\n": "line 3, column arrival_s: .*sort the trace.* got '4'",
    "arrival_s,prompt_tokens,output_tokens\n0,1,1\n1e9,1,1\n": "line 3, column arrival_s: .*within a year.* got '1e9'",
    'arrival_s,prompt_tokens,output_tokens\n0,"1,1\n': "not valid CSV",
    "TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,1\n": "line 2, column TIMESTAMP: expected a time",
    '{"timestamp": 1, "input_length": 1, "output_length": 1}\n{oops\n': "line 2, column 1: expected a JSON",
    '{"input_length": 1, "output_length": 1}\n': "line 1, column timestamp: expected milliseconds",
    '{"timestamp": NaN, "input_length": 1, "output_length": 1}\n': "line 1, column timestamp: expected milliseconds",
    '{"timestamp": 1e999, "input_length": 1, "output_length": 1}\n': "line 1, column timestamp: expected milliseconds",
    '{"timestamp": 1, "input_length": "x", "output_length": 1}\n': "line 1, column input_length",
    '{"timestamp": 1, "input_length": 1, "output_length": 1, "hash_ids": 3}\n': "line 1, column hash_ids",
    '{"timestamp": 1, "input_length": 1}\n': "line 1, column output_length: .* got None",
}


@pytest.mark.parametrize("text", BAD)
def test_bad_rows_say_where_and_what(tmp_path: Path, text: str) -> None:
    """A malformed trace names the file, the line, the column and what was expected."""
    file = tmp_path / "bad.csv"
    file.write_text(text)
    with pytest.raises(TraceError, match=BAD[text]) as error:
        read_trace(str(file))
    assert "bad.csv" in str(error.value)


@pytest.mark.parametrize("content", [b"\x1f\x8bnot gzip", b"\xff\xfe\x00broken"], ids=["gzip", "encoding"])
def test_unreadable_files_are_errors(tmp_path: Path, content: bytes) -> None:
    """Damaged files and missing ones are errors for the user, not tracebacks."""
    file = tmp_path / "bad"
    file.write_bytes(content)
    with pytest.raises(TraceError, match="cannot read"):
        read_trace(str(file))
    with pytest.raises(TraceError, match="cannot read"):
        read_trace(str(tmp_path / "missing"))


def test_requests_without_tokens_are_counted(tmp_path: Path) -> None:
    """A zero length is no error: the request is left out and the count reported."""
    file = tmp_path / "trace.csv"
    file.write_text("arrival_s,prompt_tokens,output_tokens\n0,0,5\n1,5,0\n2,5,5\n")
    workload = read_trace(str(file))
    assert [r.prompt_tokens for r in workload.requests] == [5]
    assert workload.excluded == {"no prompt or no output": 2}


def test_oversized_requests_are_counted() -> None:
    """A request that would outgrow an empty GPU is left out and counted."""
    workload = without_oversized(Workload("w", [Request(0, 60, 40), Request(1, 60, 41)]), 100)
    assert len(workload.requests) == 1
    assert workload.excluded == {"over capacity": 1}


def test_scaling_stretches_time_and_lengths_and_copies() -> None:
    """Times and lengths are multiplied; copies keep the order and the trace's span."""
    workload = Workload("w", [Request(0, 10, 20, (1,)), Request(1_000, 30, 40)])
    twice = scaled(workload, Scaling(time=2.0, length=0.5))
    assert list(twice.requests) == [Request(0, 5, 10), Request(2_000, 15, 20)]
    copied = scaled(workload, Scaling(copies=3, seed=1)).requests
    assert len(copied) == 6
    assert [r.arrival_us for r in copied] == sorted(r.arrival_us for r in copied)
    assert copied[-1].arrival_us <= 1_000
    assert copied == scaled(workload, Scaling(copies=3, seed=1)).requests


def test_the_built_in_workload_is_as_described() -> None:
    """Same seed, same requests; rate, lengths and the cut at 12,000 tokens are those of the recipe."""
    workload = paper_workload(1.1, seed=3)
    assert list(workload.requests) == list(paper_workload(1.1, seed=3).requests)
    assert list(workload.requests) != list(paper_workload(1.1, seed=4).requests)
    count = len(workload.requests)
    assert 5_000 < count < 6_000
    totals = [r.prompt_tokens + r.output_tokens for r in workload.requests]
    assert max(totals) <= 12_000
    assert 3_500 < sum(totals) / count < 5_500
    assert min(min(r.prompt_tokens, r.output_tokens) for r in workload.requests) >= 1
