import asyncio
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from mell_console.bench.client import Target
from mell_console.bench.command import main, measure
from mell_console.bench.http1 import HttpClient
from mell_console.bench.load import Load
from mell_console.bench.measure import Outcome
from mell_console.bench.prompts import Calibration
from mell_console.bench.report import print_report
from mell_console.bench.settings import BenchSettings
from mell_console.bench.warmup import BenchError
from mell_console.bench.workload import plan_shots
from mell_shared.clock import Clock, ManualClock, SystemClock
from tests.console.openai_server import Exchange, Server, plain_answer, serving


def settings(server: Server, *flags: str) -> BenchSettings:
    """Return the settings of a bench of `server`."""
    return BenchSettings.from_command_line(["--url", f"{server.url}/v1/", *flags])


async def load(made: BenchSettings, clock: Clock | None = None) -> tuple[list[Outcome], list[tuple[int, int]]]:
    """Return the outcomes of a run without warm-up, and what progress was told."""
    told: list[tuple[int, int]] = []
    http = HttpClient(made.origin, {})
    target = Target(made, "m", http, clock or SystemClock())
    outcomes, _ = await Load(target, Calibration(), lambda began, ended: told.append((began, ended))).run(
        plan_shots(made)
    )
    http.close()
    return outcomes, told


async def test_a_closed_loop_keeps_so_many_in_flight_and_no_more() -> None:
    """Every request is sent once, at most `concurrency` at a time, and that many when there is enough to do."""
    three = asyncio.Barrier(3)

    async def answer(exchange: Exchange) -> None:
        await three.wait()
        await plain_answer(exchange)

    async with serving(answer) as server:
        outcomes, told = await load(settings(server, "--requests", "12", "--concurrency", "3", "--output-tokens", "2"))
    assert len(outcomes) == len(server.requests) == 12
    assert {outcome.error for outcome in outcomes} == {""}
    assert server.most_in_flight == 3
    assert told.count((1, 0)) == told.count((0, 1)) == 12


async def test_an_open_loop_does_not_wait_for_answers() -> None:
    """All requests are in flight together when the server answers only after the last one has come."""
    twenty = asyncio.Barrier(20)

    async def answer(exchange: Exchange) -> None:
        await twenty.wait()
        await plain_answer(exchange)

    async with serving(answer) as server:
        flags = ("--rate", "2000", "--requests", "20", "--output-tokens", "1")
        outcomes, _ = await load(settings(server, *flags))
    assert server.most_in_flight == 20
    assert all(outcome.error == "" and outcome.late_us >= 0 for outcome in outcomes)


@pytest.mark.parametrize("loop", [["--concurrency", "2"], ["--rate", "200"]])
async def test_a_duration_ends_a_run_that_has_no_other_end(loop: list[str]) -> None:
    """No request starts after the time is up, those in flight are finished; here each answer takes 10 ms."""
    clock = ManualClock()

    async def answer(exchange: Exchange) -> None:
        clock.advance_us(10_000)
        await plain_answer(exchange)

    async with serving(answer) as server:
        outcomes, _ = await load(settings(server, "--duration-s", "0.05", "--output-tokens", "1", *loop), clock)
    assert {outcome.error for outcome in outcomes} == {""}
    assert 5 <= len(server.requests) == len(outcomes) <= 20


async def test_a_whole_run_finds_the_model_calibrates_and_reports() -> None:
    """From a URL alone: the listed model is asked for, prompts have the wanted tokens, the report adds up."""
    async with serving() as server:
        made = settings(server, "--requests", "5", "--prompt-tokens", "50", "--output-tokens", "3", "--api-key", "k")
        report = await measure(made, Console(file=io.StringIO()))
    assert report["settings"]["model"] == "listed"
    assert "api_key" not in report["settings"]
    assert (report["whole"], report["prompt_tokens"], report["output_tokens"]) == (5, 250, 15)
    assert all(request.headers.get("authorization") == "Bearer k" for request in server.requests)
    shown = io.StringIO()
    print_report(report, Console(file=shown, width=100))
    assert "5 whole of 5" in shown.getvalue()
    assert "time to first token" in shown.getvalue()


async def test_a_server_that_refuses_the_warm_up_is_not_measured() -> None:
    """The reason and the likely cure are told instead of a report of errors."""

    def answer(exchange: Exchange) -> None:
        exchange.begin(400, "application/json", 2)
        exchange.send("{}")

    async with serving(answer) as server:
        with pytest.raises(BenchError, match="--no-ignore-eos"):
            await measure(settings(server), Console(file=io.StringIO()))
        with pytest.raises(BenchError, match="failed in the warm-up: 400"):
            await measure(settings(server, "--no-ignore-eos"), Console(file=io.StringIO()))


def test_nobody_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """A server that does not answer ends the command with code 1 and one line."""
    assert main(["http://127.0.0.1:1"]) == 1
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert "does not answer" in said


def test_an_empty_trace_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A trace without rows is an error, not a report of nothing."""
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n")
    assert main(["http://127.0.0.1:1", "--trace", str(trace)]) == 1
    assert "holds no requests" in capsys.readouterr().err


async def test_the_command_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--json FILE` writes the report there besides the table; `-`, or nothing, only prints it."""
    async with serving() as server:
        flags = [server.url, "--requests", "2", "--output-tokens", "1"]
        assert await asyncio.to_thread(main, [*flags, "--json", str(tmp_path / "report.json")]) == 0
        assert "output tokens/s" in capsys.readouterr().out
        assert await asyncio.to_thread(main, [*flags, "--json", "-"]) == 0
        assert json.loads(capsys.readouterr().out)["whole"] == 2
        assert await asyncio.to_thread(main, [*flags, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["whole"] == 2
    assert json.loads((tmp_path / "report.json").read_text())["whole"] == 2
