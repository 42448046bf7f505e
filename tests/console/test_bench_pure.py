import gzip
import random
import statistics
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mell_console.bench.http1 import Body, ChunkedBody, HttpError, SizedBody
from mell_console.bench.measure import ClientCost, Outcome, percentile, spread_ms, summarise
from mell_console.bench.prompts import Calibration, calibrate, make_prompt
from mell_console.bench.report import warnings
from mell_console.bench.settings import BenchSettings
from mell_console.bench.sse import StreamReader, error_kind
from mell_console.bench.workload import Shot, TraceError, draw_length, plan_shots
from tests.console.openai_server import event, piece, usage

ANSWER = (
    ": a comment\n\n"
    + event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
    + piece("héllo")
    + piece('"quoted"')
    + piece("", finish="length")
    + usage(5, 2)
    + "data: [DONE]\n\n"
).encode()


def settings(*flags: str) -> BenchSettings:
    """Return settings from flags."""
    return BenchSettings.from_command_line(list(flags))


# --- reading a stream


@given(st.lists(st.integers(0, 2 * len(ANSWER)), max_size=8), st.booleans())
def test_an_answer_reads_the_same_however_it_is_cut(cuts: list[int], carriage_returns: bool) -> None:
    """Pieces, usage, finish and end do not depend on where reads split the bytes, nor on the line ends."""
    wire = ANSWER.replace(b"\n", b"\r\n") if carriage_returns else ANSWER
    stream = StreamReader()
    counted = sum(
        stream.feed(wire[start:end])
        for start, end in pairwise([0, *sorted(min(cut, len(wire)) for cut in cuts), len(wire)])
    )
    assert (counted, stream.pieces, stream.done, stream.finish_reason) == (2, 2, True, "length")
    assert stream.usage["completion_tokens"] == 2


@pytest.mark.parametrize(
    ("chunk", "pieces"),
    [
        ('{"choices":[{"text":"x"}]}', 1),
        ('{"choices": [{"text": ""}]}', 0),
        ('{"choices":[{"delta":{"content":null,"reasoning_content":"hm"}}]}', 1),
        ('{"choices":[{"delta":{"tool_calls":[{"function":{"arguments":"{"}}]}}]}', 1),
        ('{"choices":[{"delta":{}}]}', 0),
        ("not json", 0),
    ],
)
def test_a_piece_is_an_event_that_shows_something(chunk: str, pieces: int) -> None:
    """Text, reasoning and tool arguments count when they are not empty."""
    assert StreamReader().feed(event(chunk).encode()) == pieces


def test_null_usage_in_each_chunk_is_no_usage() -> None:
    """Servers that send `usage: null` until the last chunk are read correctly, and broken usage is none."""
    stream = StreamReader()
    stream.feed(piece("a").encode() + b'data: {"usage": {"broken"\n\n' + b'data: ["usage": {}]\n\n')
    assert stream.usage == {}


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b'{"error": {"code": "c", "type": "t"}}', "c"),
        (b'{"error": {"code": null, "type": "t"}}', "t"),
        (b'{"error": {"message": "went wrong"}}', "went wrong"),
        (b'{"error": "text"}', "no OpenAI error body"),
        (b"<html>", "no OpenAI error body"),
    ],
)
def test_an_error_body_has_a_short_kind(body: bytes, kind: str) -> None:
    """Errors are counted by code, else type, else message."""
    assert error_kind(body) == kind


# --- bodies


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=6), st.lists(st.integers(0, 400), max_size=8))
def test_a_chunked_body_is_its_chunks_however_it_is_cut(chunks: list[bytes], cuts: list[int]) -> None:
    """Any split of the wire gives back the content, and the end is seen exactly at the end."""
    wire = b"".join(b"%x;x=y\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
    places = [0, *sorted(min(cut, len(wire)) for cut in cuts), len(wire)]
    body = ChunkedBody()
    content = b""
    for start, end in pairwise(places):
        content += body.feed(wire[start:end])
        assert body.done == (end == len(wire))
    assert content == b"".join(chunks)


def test_a_body_that_ends_too_early_is_an_error() -> None:
    """A lost connection is an error for bodies that announce their end, and the end for those that do not."""
    for body in (ChunkedBody(), SizedBody(3)):
        with pytest.raises(HttpError, match="broken off"):
            body.end()
    plain = Body()
    plain.end()
    assert plain.done
    assert SizedBody(0).done


# --- lengths and starts


def test_fixed_lengths_and_a_hundred_requests_are_the_default() -> None:
    """Without flags: 100 requests of 128 in and 64 out, in a closed loop."""
    assert list(plan_shots(settings())) == [Shot(128, 64)] * 100


def test_a_duration_alone_gives_endless_requests() -> None:
    """With only a time limit the loop decides when to end."""
    assert len(list(islice(plan_shots(settings("--duration-s", "1")), 5000))) == 5000


def test_lognormal_lengths_have_the_mean_that_was_asked_for() -> None:
    """The mean of many draws is within 3% of the flag, and a seed gives the same draws again."""
    made = settings("--lengths", "lognormal", "--prompt-tokens", "300")
    source = random.Random(1)
    draws = [draw_length(source, made, 300) for _ in range(20_000)]
    assert min(draws) >= 1
    assert statistics.mean(draws) == pytest.approx(300, rel=0.03)
    assert list(plan_shots(made)) == list(plan_shots(made))
    assert list(plan_shots(made)) != list(plan_shots(settings("--lengths", "lognormal", "--seed", "1")))


def test_poisson_starts_have_the_rate_and_uniform_ones_are_equal() -> None:
    """Gaps average 1/rate; uniform gaps are all 1/rate; the first request starts at once."""
    poisson = [shot.start_s for shot in plan_shots(settings("--rate", "50", "--requests", "20000"))]
    assert poisson[0] == 0
    assert poisson[-1] == pytest.approx(400, rel=0.03)
    uniform = [shot.start_s for shot in plan_shots(settings("--rate", "4", "--arrivals", "uniform", "--requests", "4"))]
    assert uniform == [0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize("compressed", [False, True])
def test_a_trace_gives_lengths_and_starts(tmp_path: Path, compressed: bool) -> None:
    """Rows become requests, the first at time zero, hurried by the speed-up; other columns are ignored."""
    text = "note,arrival_s,prompt_tokens,output_tokens\nx,10,5,6\ny,12.5,7,8\nz,20,9,1\n"
    path = tmp_path / ("trace.csv.gz" if compressed else "trace.csv")
    path.write_bytes(gzip.compress(text.encode()) if compressed else text.encode())
    shots = list(plan_shots(settings("--trace", str(path), "--speedup", "2", "--requests", "2")))
    assert shots == [Shot(5, 6, 0.0), Shot(7, 8, 1.25)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b\n1,2\n", "no column arrival_s"),
        ("", "no column arrival_s"),
        ("arrival_s,prompt_tokens,output_tokens\n1,2\n", "line 2"),
        ("arrival_s,prompt_tokens,output_tokens\n1,x,3\n", "line 2"),
        ("arrival_s,prompt_tokens,output_tokens\nnan,2,3\n", "line 2: needs a finite"),
        ("arrival_s,prompt_tokens,output_tokens\n1,0,3\n", "line 2: needs"),
        ("arrival_s,prompt_tokens,output_tokens\n2,2,3\n1,2,3\n", "line 3: arrives before"),
    ],
)
def test_a_broken_trace_is_told_with_its_line(tmp_path: Path, text: str, words: str) -> None:
    """A trace that cannot be replayed says where and why."""
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(TraceError, match=words):
        list(plan_shots(settings("--trace", str(path))))


def test_a_missing_or_binary_trace_is_told(tmp_path: Path) -> None:
    """Files that are not there or no text are errors of the trace."""
    with pytest.raises(TraceError, match="cannot read"):
        list(plan_shots(settings("--trace", str(tmp_path / "none.csv"))))
    broken = tmp_path / "broken.csv.gz"
    broken.write_bytes(b"no gzip")
    with pytest.raises(TraceError, match="cannot read"):
        list(plan_shots(settings("--trace", str(broken))))


# --- prompts


def test_prompts_have_the_length_that_the_server_counts() -> None:
    """Two measurements give the words for any length, whatever the template adds."""
    calibration = calibrate((8, 30 + 8 * 5), (72, 30 + 72 * 5))
    assert calibration.words_for(30 + 200 * 5) == 200
    assert calibration.words_for(1) == 1
    assert len(make_prompt(3, 200).split()) == 200


@pytest.mark.parametrize("other", [(8, 50), (72, 10), (72, 5)])
def test_senseless_counts_leave_a_word_a_token(other: tuple[int, int]) -> None:
    """A server that reports no usage is sent as many words as tokens were asked for."""
    assert calibrate((8, 10), other) == Calibration()


def test_prompts_of_different_requests_differ_from_the_start() -> None:
    """Equal seeds give equal prompts; a prefix cache finds nothing in common otherwise."""
    assert make_prompt(5, 50) == make_prompt(5, 50)
    beginnings = {make_prompt(seed, 50)[:40] for seed in range(200)}
    assert len(beginnings) == 200


# --- figures


@given(st.lists(st.floats(0, 1e9), min_size=1, max_size=50), st.integers(0, 100))
def test_percentiles_are_those_of_numpy(values: list[float], percent: int) -> None:
    """Linear interpolation between closest ranks."""
    expected = float(np.percentile(values, percent))
    assert percentile(sorted(values), percent) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_spread_is_in_milliseconds_and_empty_for_nothing() -> None:
    """Microseconds in, milliseconds out; no values, no figures."""
    assert spread_ms([1000, 2000, 3000]) == {"mean": 2.0, "p50": 2.0, "p90": 2.8, "p99": 2.98, "max": 3.0}
    assert spread_ms([]) == {}


def test_a_report_counts_whole_answers_and_errors_apart() -> None:
    """Latencies come from whole answers; tokens a second from all output; errors by kind; checked by hand."""
    outcomes = [
        Outcome(0, 0, 100_000, 400_000, 500_000, [100_000] * 3, 4, 10, 4, 3, counted=True),
        Outcome(200_000, 4000, 500_000, 700_000, 1_000_000, [200_000], 2, 20, 3, 0, counted=True),
        Outcome(300_000, 0, None, None, 2_000_000, [], 0, 0, 0, 0, error="429 queue_full"),
        Outcome(300_000, 0, 400_000, 400_000, 500_000, [], 1, 0, 1, 0, error="broken off"),
    ]
    report = summarise(outcomes, ClientCost(cpu_s=0.5, wall_s=2.5))
    assert (report["requests"], report["whole"]) == (4, 2)
    assert report["errors"] == {"429 queue_full": 1, "broken off": 1}
    assert (report["prompt_tokens"], report["cached_tokens"], report["output_tokens"]) == (30, 3, 8)
    assert (report["duration_s"], report["output_tokens_per_s"], report["requests_per_s"]) == (2.0, 4.0, 1.0)
    assert report["ttft_ms"]["mean"] == 200.0
    assert report["inter_token_ms"]["mean"] == 125.0
    assert report["per_token_ms"]["mean"] == 100.0
    assert report["end_to_end_ms"]["max"] == 800.0
    assert report["late_ms"]["max"] == 4.0
    assert (report["client_cpu_share"], report["tokens_counted_by"]) == (0.2, "usage")


def test_a_run_without_an_answer_still_has_a_report() -> None:
    """Nothing divides by zero when nothing came back."""
    report = summarise([], ClientCost(0.0, 0.0))
    assert (report["requests"], report["output_tokens_per_s"], report["ttft_ms"]) == (0, 0.0, {})


def test_figures_that_must_be_doubted_are_marked() -> None:
    """Errors, a busy client, late requests and missing usage are said in words."""
    outcomes = [Outcome(0, 60_000, 1, 2, 3, [1], 2, 0, 2), Outcome(0, error="timeout")]
    said = " | ".join(warnings(summarise(outcomes, ClientCost(0.9, 1.0))))
    for words in ("1 x timeout", "90% of a core", "sent late", "counted by pieces"):
        assert words in said
    mixed = [Outcome(0, counted=True), Outcome(0)]
    assert summarise(mixed, ClientCost(0, 1))["tokens_counted_by"] == "usage (1 answers), pieces (1)"


@pytest.mark.parametrize("flags", [["--rate", "3", "--trace", "x"], ["--url", "ftp://x"], ["--requests", "-1"]])
def test_wrong_settings_end_with_code_2(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Contradicting or impossible flags are told in one line."""
    with pytest.raises(SystemExit) as ended:
        settings(*flags)
    assert ended.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
