import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mell_shared.process import StartError, death_with_parent, run_service

SERVICE = """
import asyncio, sys
from mell_shared.bus import BrokerUnreachableError
from mell_shared.process import StartError, run_service

async def main(stop):
    if sys.argv[1] == "cannot":
        raise StartError("port 1 is taken; choose another")
    if sys.argv[1] == "unreachable":
        raise BrokerUnreachableError("no broker; start one")
    if sys.argv[1] == "bug":
        raise ZeroDivisionError
    print("ready", type(asyncio.get_running_loop()).__module__, flush=True)
    await stop.wait()
    print("stopping", flush=True)
    if sys.argv[1] == "hang":
        await asyncio.Event().wait()
    print("stopped", flush=True)

if sys.argv[1] == "plain":
    sys.modules["uvloop"] = None
run_service(main)
"""


def start(kind: str) -> subprocess.Popen[str]:
    """Start a small service of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", SERVICE, kind], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_a_service_cleanly(number: signal.Signals) -> None:
    """Either signal lets the service finish its stop, and the exit code is 0."""
    with start("good") as service:
        assert service.stdout is not None
        assert service.stdout.readline() == "ready uvloop\n"
        service.send_signal(number)
        out, err = service.communicate(timeout=60)
    assert (service.returncode, out, err) == (0, "stopping\nstopped\n", "")


def test_a_service_runs_without_uvloop() -> None:
    """Where uvloop is missing the standard loop does."""
    with start("plain") as service:
        assert service.stdout is not None
        assert service.stdout.readline().startswith("ready asyncio")
        service.terminate()
        service.communicate(timeout=60)
    assert service.returncode == 0


def test_a_second_signal_ends_a_service_that_hangs() -> None:
    """A stop that does not come to its end can be cut short; the exit code names the signal."""
    with start("hang") as service:
        assert service.stdout is not None
        service.stdout.readline()
        service.terminate()
        assert service.stdout.readline() == "stopping\n"
        service.send_signal(signal.SIGINT)
        service.communicate(timeout=60)
    assert service.returncode == 128 + signal.SIGINT


@pytest.mark.parametrize(
    ("kind", "told"),
    [("cannot", "mell: port 1 is taken; choose another\n"), ("unreachable", "mell: no broker; start one\n")],
)
def test_a_service_that_cannot_start_says_why_in_one_line(kind: str, told: str) -> None:
    """What the user can repair is one line on stderr and exit code 1."""
    with start(kind) as service:
        out, err = service.communicate(timeout=60)
    assert (service.returncode, out, err) == (1, "", told)


def test_a_bug_ends_a_service_with_its_traceback() -> None:
    """Anything else is shown in full and the exit code is not 0."""
    with start("bug") as service:
        _, err = service.communicate(timeout=60)
    assert service.returncode == 1
    assert "ZeroDivisionError" in err
    assert "Traceback" in err


def test_a_child_dies_with_its_parent() -> None:
    """When the parent is killed outright its child gets the signal."""
    parent = (
        "import subprocess, sys\n"
        "from mell_shared.process import StartError, death_with_parent, run_service\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'],"
        " preexec_fn=death_with_parent())\n"
        "print(child.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        os.kill(child, 0)
        process.kill()
    asyncio.run(ended(child))


async def ended(pid: int) -> None:
    """Return when the process `pid` is gone or waits for its new parent to notice."""
    async with asyncio.timeout(60):
        while _state(pid) not in ("", "Z"):  # noqa: ASYNC110 - another process sets no event of ours
            await asyncio.sleep(0.01)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def test_elsewhere_no_parent_death_is_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Off Linux there is nothing to run in the child."""
    monkeypatch.setattr(sys, "platform", "darwin")
    assert death_with_parent() is None


def test_the_loop_is_left_as_it_was() -> None:
    """Run inside this process: the signal sets the event, and afterwards the process's own handlers are back."""
    before = signal.getsignal(signal.SIGTERM)

    async def main(stop: asyncio.Event) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        async with asyncio.timeout(60):
            await stop.wait()

    run_service(main)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_start_error_is_an_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    """Run inside this process: one line and `SystemExit` with code 1."""

    async def main(_stop: asyncio.Event) -> None:
        raise StartError("choose another")

    with pytest.raises(SystemExit) as caught:
        run_service(main)
    assert caught.value.code == 1
    assert capsys.readouterr().err == "mell: choose another\n"
