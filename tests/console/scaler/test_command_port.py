import asyncio
import errno
import os
import signal
import sys
from pathlib import Path

import pytest

from mell_console.scaler.command_port import CommandPort
from mell_console.scaler.loop import ScaleError
from mell_console.scaler.values import StartWorkers, StopWorker
from tests.console.up_process import alive

START = StartWorkers(3, ("worker-2", "worker-3"))
STOP = StopWorker("worker-3-0000000a", "worker-3", "node-1", 2)


def port(folder: Path, source: str, timeout_s: float = 60.0) -> CommandPort:
    """Return a port whose program is this Python source; its first argument is a file to write to."""
    return CommandPort([sys.executable, "-c", f"import os, sys, time\n{source}", str(folder / "out")], "m", timeout_s)


SAY = """
with open(sys.argv[1], "a") as file:
    own = sorted(name for name in os.environ if name.startswith("MELL_SCALER_"))
    print(*sys.argv[2:], *(f"{name[12:]}={os.environ[name]}" for name in own), file=file, sep="|")
"""


async def test_the_program_is_told_all_by_arguments_and_variables(tmp_path: Path) -> None:
    """What to do, how many there are to be, and whom it is about."""
    made = port(tmp_path, SAY)
    await made.start(START)
    await made.stop(STOP)
    assert (tmp_path / "out").read_text().splitlines() == [
        "start|3|worker-2|worker-3|ACTION=start|COUNT=3|MODEL=m|NAMES=worker-2 worker-3",
        "stop|2|worker-3|ACTION=stop|COUNT=2|HOST=node-1|MODEL=m|NAMES=worker-3|WORKER=worker-3-0000000a",
    ]


async def test_a_program_that_fails_is_told_with_its_last_words(tmp_path: Path) -> None:
    """All the workers it was to start count as not started."""
    made = port(tmp_path, "print('no card\\nis free'); sys.exit(3)")
    with pytest.raises(ScaleError, match=r"code 3: no card / is free") as caught:
        await made.start(START)
    assert caught.value.failed == 2
    with pytest.raises(ScaleError, match="code 3"):
        await made.stop(STOP)


async def test_a_program_that_cannot_be_run_is_told(tmp_path: Path) -> None:
    """A missing file is no traceback."""
    with pytest.raises(ScaleError, match="cannot run /no/such"):
        await CommandPort(["/no/such"], "m", 1.0).start(START)


async def test_a_full_disk_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its output has no place nothing is run, and the scaler goes on."""

    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(ScaleError, match="cannot run /bin/true: No space left") as caught:
        await CommandPort(["/bin/true"], "m", 1.0).start(START)
    assert caught.value.failed == 2


async def test_a_program_out_of_time_is_killed_with_what_it_started(tmp_path: Path) -> None:
    """Nothing of it is left to come late."""
    source = """
import subprocess
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(sys.argv[1], "w").write(f"{os.getpid()} {child.pid}")
os.rename(sys.argv[1], sys.argv[1] + ".done")
time.sleep(600)
"""
    made = port(tmp_path, source, timeout_s=5.0)
    with pytest.raises(ScaleError, match="longer than 5 s"):
        await made.start(START)
    written = tmp_path / "out.done"
    if written.exists():  # else it was killed before it had begun
        async with asyncio.timeout(60):
            while any(alive(int(pid)) for pid in written.read_text().split()):  # noqa: ASYNC110 - a stranger's child
                await asyncio.sleep(0.01)


async def test_what_it_leaves_running_is_not_waited_for(tmp_path: Path) -> None:
    """A worker started by the program holds its output open; the order is done all the same, and the worker lives."""
    source = """
import subprocess
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(sys.argv[1], "w").write(str(child.pid))
"""
    await port(tmp_path, source).start(START)
    pid = int((tmp_path / "out").read_text())
    assert alive(pid)
    os.kill(pid, signal.SIGKILL)


async def test_orders_are_carried_out_one_after_the_other(tmp_path: Path) -> None:
    """Two at once would give two counts to whoever counts."""
    source = """
path = sys.argv[1] + ".lock"
os.close(os.open(path, os.O_CREAT | os.O_EXCL))
time.sleep(0.05)
os.remove(path)
"""
    made = port(tmp_path, source)
    await asyncio.gather(made.start(START), made.stop(STOP), made.start(START))
