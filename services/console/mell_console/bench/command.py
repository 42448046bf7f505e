"""`mell bench` from its flags to its exit code."""

import asyncio
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mell_console.bench.client import Target
from mell_console.bench.http1 import HttpClient
from mell_console.bench.load import Load
from mell_console.bench.measure import summarise
from mell_console.bench.report import print_report
from mell_console.bench.settings import BenchSettings
from mell_console.bench.warmup import BenchError, find_model, warm_up
from mell_console.bench.workload import Shot, TraceError, plan_shots
from mell_shared.clock import SystemClock
from mell_shared.process import loop_factory


def main(arguments: list[str]) -> int:
    """Measure the server that `arguments` name (a URL first, or `--url`); return the exit code."""
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--url", *arguments]
    if arguments and arguments[-1] == "--json":
        arguments = [*arguments, "-"]
    settings = BenchSettings.from_command_line(arguments)
    console = Console(stderr=True)
    try:
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            report = runner.run(measure(settings, console))
        _deliver(report, settings.json_to)
    except (BenchError, TraceError) as error:
        sys.stderr.write(f"mell bench: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("mell bench: interrupted, nothing is reported\n")
        return 130
    if settings.json_to != "-":
        print_report(report, Console())
    return 0 if report["whole"] else 1


async def measure(settings: BenchSettings, console: Console) -> dict[str, Any]:
    """Warm up, load, and return the report; raises `BenchError`, `TraceError`."""
    shots, total = _counted(plan_shots(settings), settings)
    model = await asyncio.to_thread(find_model, settings)
    headers = {"authorization": f"Bearer {settings.api_key}"} if settings.api_key else {}
    http = HttpClient(settings.origin, headers)
    try:
        target = Target(settings, model, http, SystemClock())
        calibration = await warm_up(target)
        with _progress(console) as progress:
            task = progress.add_task(f"{model} at {settings.origin}", total=total, started_requests=0)
            started = itertools.count(1)

            def tell(began: int, ended: int) -> None:
                if began:
                    progress.update(task, started_requests=next(started))
                progress.advance(task, ended)

            outcomes, cost = await Load(target, calibration, tell).run(shots)
    finally:
        http.close()
    told = settings.model_dump(mode="json", exclude={"api_key", "json_to"})
    return {"settings": {**told, "model": model}, **summarise(outcomes, cost)}


def _counted(shots: Iterator[Shot], settings: BenchSettings) -> tuple[Iterator[Shot], int | None]:
    """Return the shots and how many there are; None if time alone limits them. Reads a trace to its end."""
    if settings.trace is None and not settings.requests and settings.duration_s:
        return shots, None
    listed = list(shots)
    if not listed:
        raise TraceError(f"{settings.trace} holds no requests")
    return iter(listed), len(listed)


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, refresh_per_second=2, disable=not console.is_terminal)


def _deliver(report: dict[str, Any], json_to: str) -> None:
    text = json.dumps(report, indent=1) + "\n"
    if json_to == "-":
        sys.stdout.write(text)
    elif json_to:
        try:
            Path(json_to).write_text(text)
        except OSError as error:
            raise BenchError(f"cannot write {json_to}: {error.strerror}") from error
