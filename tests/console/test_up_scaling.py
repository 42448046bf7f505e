"""`mell up --workers 1..4` under load, as real processes: it grows, shrinks, and loses nothing."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.console.up_process import Starter

pytestmark = [pytest.mark.connected, pytest.mark.timeout(600)]

_SLOW_SMALL = {"MELL_FAKE_STEP_US": "20000", "MELL_PROFILE_S": "0", "MELL_KV_BLOCKS": "64"}
"""A step of 20 ms and 64 blocks of 16 tokens: seven answers of 130 tokens are all that one worker holds."""


def start_bench(url: str, *flags: str) -> subprocess.Popen[str]:
    """Start a `mell bench`."""
    command = [sys.executable, "-m", "mell_console", "bench", url, *flags, "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def report_of(running: subprocess.Popen[str]) -> dict[str, object]:
    """Wait for its end and return its report."""
    return dict(json.loads(running.communicate(timeout=300)[0]))


def bench(url: str, *flags: str) -> dict[str, object]:
    """Return the report of a `mell bench`."""
    with start_bench(url, *flags) as running:
        return report_of(running)


def test_workers_come_with_the_load_and_go_with_it(start: Starter, tmp_path: Path) -> None:
    """One worker becomes several while requests wait in line, every request is answered whole, and one is left."""
    up = start("--workers", "1..3", "--scale-down-s", "3", "--scale-cooldown-s", "1", **_SLOW_SMALL)
    url = up.up()
    assert len([command for command in up.family.values() if "mell_gpu_worker" in command]) == 1
    flags = ["--requests", "50", "--concurrency", "25", "--prompt-tokens", "16", "--output-tokens", "100"]
    with start_bench(url, *flags) as running:
        up.until(r"worker-2: .* KV blocks")
        up.meet()
        second = up.child("--worker-name worker-2")
        report = report_of(running)
    assert report["whole"] == 50, report
    assert re.search(r"(?m)^scaler: \d workers are wanted: starting worker-2", up.text)
    left = r"scaler: worker-\d-\w+ is drained and empty: stopping it, (\d) are left"
    while up.until(left)[1] != "1":
        pass
    # Not one that was drained had anything to give back.
    assert "was killed" not in up.text
    assert bench(url, "--requests", "2", "--concurrency", "1", "--output-tokens", "4")["whole"] == 2
    assert up.end(signal.SIGINT) == 0
    assert up.gone()
    assert second in up.family
    assert "Traceback" not in up.text


def test_a_worker_that_cannot_start_is_told_and_the_rest_serves_on(start: Starter, tmp_path: Path) -> None:
    """A second worker that fails at its start is told with its reason; the first serves all, and mended it comes."""
    (tmp_path / "logs" / "worker-2.log").mkdir(parents=True)
    up = start("--workers", "1..2", "--log-dir", str(tmp_path / "logs"), **_SLOW_SMALL)
    url = up.up()
    report = bench(url, "--requests", "16", "--concurrency", "16", "--output-tokens", "50")
    assert report["whole"] == 16, report
    up.until(r"scaler: starting failed: worker-2: cannot write .*worker-2.log: Is a directory; not tried again for 5 s")
    (tmp_path / "logs" / "worker-2.log").rmdir()
    # It is wanted only while requests wait, and tried again only after its delay.
    for _ in range(10):
        assert bench(url, "--requests", "16", "--concurrency", "16", "--output-tokens", "50")["whole"] == 16
        if re.search(r"(?m)^worker-2: .* KV blocks", up.text):
            break
    else:
        raise AssertionError(up.text)
    assert up.end(signal.SIGINT) == 0
    assert up.gone()
