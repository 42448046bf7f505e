"""Mell's real processes under measurement: their CPU time and memory, and the load that their clients make."""

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from mell_console.bench.client import Target
from mell_console.bench.http1 import HttpClient
from mell_console.bench.load import Load
from mell_console.bench.measure import summarise
from mell_console.bench.settings import BenchSettings
from mell_console.bench.warmup import warm_up
from mell_console.bench.workload import plan_shots
from mell_shared.clock import SystemClock
from mell_shared.process import death_with_parent, loop_factory
from tests.cluster.stack import Stack

FAKE = ("--engine", "fake", "--kv-blocks", "16384")
CLIENT = "load client"
_LOADING_S = 180.0
"""Only ends a benchmark that has failed."""
SERVICES = ("frontend", "worker", "scheduler", "nats-server")


@dataclass(frozen=True, slots=True)
class Round:
    """One run of the load: what clients saw (`mell bench`'s report) and the CPU seconds of each process."""

    report: dict[str, Any]
    cpu_s: dict[str, float]
    prompt_tokens: list[int]
    pieces: int
    """SSE events with text; fewer than tokens where some were sent together."""

    @property
    def tokens(self) -> int:
        """Output tokens that reached the clients."""
        return int(self.report["output_tokens"])

    @property
    def tokens_per_s(self) -> float:
        """Output tokens of all clients per second, from the first request to the last end."""
        return float(self.report["output_tokens_per_s"])

    def us_per_token(self, process: str) -> float:
        """CPU microseconds of a process for each output token."""
        return self.cpu_s[process] / self.tokens * 1e6

    def cores(self, process: str) -> float:
        """CPU seconds of a process for each second of the run."""
        return self.cpu_s[process] / float(self.report["duration_s"])


class MeasuredStack:
    """A broker, a scheduler, one worker and a frontend with the settings that users get; gone when left."""

    def __init__(self, folder: Path, model: str, *worker: str) -> None:
        self._stack = Stack(folder, settings={"MELL_LOG_FORMAT": "json"})
        self._model = model
        self._worker = worker
        self.url = ""
        self.processes: dict[str, psutil.Process] = {}

    def __enter__(self) -> "MeasuredStack":
        self._stack.__enter__()
        try:
            self._start()
        except BaseException:
            self._stack.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.__exit__()

    def _start(self) -> None:
        worker = self._stack.start("mell_gpu_worker", "--model", self._model, *self._worker)
        scheduler = self._stack.start("mell_scheduler")
        frontend = self._stack.start_frontend(model=self._model)
        worker.ready(_LOADING_S)
        self.url = frontend.ready(_LOADING_S)["url"]
        pids = {
            "frontend": frontend.process.pid,
            "worker": worker.process.pid,
            "scheduler": scheduler.process.pid,
            "nats-server": self._stack.broker.pid,
        }
        self.processes = {name: psutil.Process(pid) for name, pid in pids.items()}

    def cpu_s(self) -> dict[str, float]:
        """CPU seconds of each service since its start."""
        times = {name: process.cpu_times() for name, process in self.processes.items()}
        return {name: used.user + used.system for name, used in times.items()}

    def memory_mb(self) -> dict[str, float]:
        """Resident memory of each service now."""
        return {name: process.memory_info().rss / 1e6 for name, process in self.processes.items()}

    def load(self, *, tell: Callable[[int, int], None] = lambda began, ended: None, **settings: Any) -> Round:
        """See `run_load`."""
        return run_load(BenchSettings(url=self.url, model=self._model, **settings), self.cpu_s, tell)


def run_load(
    settings: BenchSettings,
    cpu_s: Callable[[], dict[str, float]],
    tell: Callable[[int, int], None] = lambda began, ended: None,
) -> Round:
    """Run `mell bench`'s load from this process; every answer must come whole.

    `cpu_s` tells the CPU seconds of each process that counts. The warm-up comes first, uncounted.
    """
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        done = runner.run(_load(settings, cpu_s, tell))
    assert not done.report["errors"], done.report["errors"]
    return done


async def _load(
    settings: BenchSettings, cpu_s: Callable[[], dict[str, float]], tell: Callable[[int, int], None]
) -> Round:
    http = HttpClient(settings.url, {})
    try:
        target = Target(settings, settings.model, http, SystemClock())
        load = Load(target, await warm_up(target), tell)
        before = cpu_s()
        outcomes, cost = await load.run(plan_shots(settings))
        after = cpu_s()
    finally:
        http.close()
    used = {name: after[name] - before[name] for name in after}
    lengths = [outcome.prompt_tokens for outcome in outcomes]
    pieces = sum(outcome.pieces for outcome in outcomes)
    return Round(summarise(outcomes, cost), used | {CLIENT: cost.cpu_s}, lengths, pieces)


class BareEngine:
    """The engine alone, in a process of its own; gone when left."""

    def __init__(self, *worker: str) -> None:
        command = [sys.executable, "-m", "tests.benchmarks.bare_engine", *worker]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=death_with_parent(signal.SIGKILL),  # noqa: PLW1509 - one system call, allocates nothing
        )

    def __enter__(self) -> "BareEngine":
        try:
            self._read()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.kill()
        self._process.communicate()

    def run(self, prompt_tokens: list[int], output_tokens: int) -> dict[str, float]:
        """Run a batch; returns `tokens`, `wall_s`, `cpu_s`."""
        assert self._process.stdin is not None
        batch = {"prompt_tokens": prompt_tokens, "output_tokens": output_tokens}
        self._process.stdin.write(json.dumps(batch) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the bare engine has ended"
        return dict(json.loads(line))
