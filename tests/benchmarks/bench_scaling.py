"""`mell up --workers 1..4` under a load that rises and falls: workers up, wanted and needed over time, and the plot.

BENCH_SVG=docs/scaling.svg python -m pytest -m benchmark -s tests/benchmarks/bench_scaling.py
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from mell_console.admin.ask import Frontend
from mell_scheduler.sim.html import as_svg
from mell_shared.messages.admin import STATUS, Status
from tests.benchmarks.figures import print_table, size
from tests.console.up_process import Up

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(600)]

_KV_BLOCKS, _PROMPT, _OUTPUT = 96, 64, 256
_SETTINGS = {"MELL_FAKE_STEP_US": "40000", "MELL_KV_BLOCKS": str(_KV_BLOCKS), "MELL_PROFILE_S": "0"}
_SAMPLE_S = 0.5


def test_workers_follow_the_load(tmp_path: Path) -> None:
    """Requests come as often as for a quarter of a worker, then up to two and a half, then as at first."""
    up = Up(tmp_path, "--workers", "1..4", "--scale-down-s", "10", "--scale-cooldown-s", "3", **_SETTINGS)
    try:
        samples, told = follow(up, arrivals(size("SECONDS", 120)), tmp_path)
        assert up.end(signal.SIGINT) == 0
    finally:
        up.process.kill()
        up.wait()
        assert up.process.stdout is not None
        up.process.stdout.close()
    path = Path(os.environ.get("BENCH_SVG", tmp_path / "scaling.svg"))
    path.write_text(as_svg("Workers up, wanted and needed", lines(samples)))
    _print(told, samples, path, up)


def follow(up: Up, rows: list[float], folder: Path) -> tuple[list[tuple[float, Status]], dict[str, Any]]:
    """Load it at these times; returns the status twice a second and the report."""
    url = up.up()
    trace, report = folder / "trace.csv", folder / "report.json"
    lines = [f"{at:.3f},{_PROMPT},{_OUTPUT}\n" for at in rows]
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n" + "".join(lines))
    command = [sys.executable, "-m", "mell_console", "bench", url, "--trace", str(trace), "--json", str(report)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as load:
        samples = sample(up, url, load)
    told = json.loads(report.read_text())
    assert told["whole"] == len(rows), told
    return samples, told


def arrivals(seconds: int) -> list[float]:
    """Return Poisson arrivals whose rate rises to its peak in the middle third and falls again."""
    draw = random.Random(1)
    # One worker holds about this many such requests at once, each for its output's steps.
    per_worker = _KV_BLOCKS / ((_PROMPT + 16 + _OUTPUT) / 16) / (_OUTPUT * 0.04)
    found, passed = [0.0], 0.0
    while passed < seconds:
        share = min(1.0, 3 * passed / seconds, 3 * (seconds - passed) / seconds)
        passed += draw.expovariate(per_worker * (0.25 + 2.25 * share))
        found.append(passed)
    return found


def sample(up: Up, url: str, load: "subprocess.Popen[bytes]") -> list[tuple[float, Status]]:
    """Return the status twice a second until the load is over and one worker is left."""
    frontend, begun_s = Frontend(url, ""), time.monotonic()
    samples: list[tuple[float, Status]] = []
    while load.poll() is None or _up(samples[-1][1]) > 1:
        samples.append((time.monotonic() - begun_s, frontend.get("status", STATUS)))
        assert up.process.poll() is None, up.text
        time.sleep(_SAMPLE_S)
    return samples


def _up(status: Status) -> int:
    return sum(worker.state != "silent" for worker in status.workers)


def _needed(status: Status) -> float:
    """Workers' worth of KV in use, and waited for."""
    used = sum(worker.used_blocks for worker in status.workers) / _KV_BLOCKS
    return used + status.queued * ((_PROMPT + 16 + _OUTPUT) / 16) / _KV_BLOCKS


def lines(samples: list[tuple[float, Status]]) -> dict[str, tuple[list[float], list[float]]]:
    """Return the plot's lines by name."""
    times = [at for at, _ in samples]
    return {
        "workers up": (times, [float(_up(status)) for _, status in samples]),
        "wanted": (times, [float(sum(model.gpus_wanted for model in status.models)) for _, status in samples]),
        "load, in workers": (times, [_needed(status) for _, status in samples]),
    }


def _print(told: dict[str, Any], samples: list[tuple[float, Status]], path: Path, up: Up) -> None:
    up_s = sum((after - at) * _up(status) for (at, status), (after, _) in pairwise(samples))
    end_s, last = samples[-1]
    rows = [
        ["requests answered whole, refused", f"{told['whole']}, {last.rejected}"],
        ["worker-seconds, against four workers all the time", f"{up_s:,.0f} of {4 * end_s:,.0f}"],
        ["most workers", str(max(_up(status) for _, status in samples))],
        ["starts, stops", f"{up.text.count('starting worker')}, {up.text.count('stopping it')}"],
        ["moves made, failed", f"{last.migrated}, {last.migrations_failed}"],
    ]
    print_table(f"Workers follow the load, {end_s:.0f} s", ["figure", ""], rows)
    print(json.dumps({name: part for name, part in told.items() if name != "settings"}))  # noqa: T201 - for reading
    print(f"\nplot: {path}")  # noqa: T201 - figures are for reading
