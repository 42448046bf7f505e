import asyncio
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from rich.console import Console

from mell_console.up import service as service_module
from mell_console.up.child import Child, ChildSpec
from mell_console.up.logfile import LogFile
from mell_console.up.plan import WorkerPlan
from mell_console.up.screen import make_screen
from mell_console.up.service import Notice, Service, ServicePorts
from mell_console.up.settings import UpSettings
from mell_console.up.stack import Stack, StackPlan
from mell_shared.clock import SystemClock
from mell_shared.process import StartError
from tests.console.conftest import ProgramMaker
from tests.console.up_process import alive

FOREVER = "say('ready', model='m')\nwhile True: time.sleep(1)\n"


class Stage:
    """One supervised service with its log and what it told the user."""

    def __init__(self, folder: Path, spec: ChildSpec) -> None:
        self.notices: list[Notice] = []
        self.log = LogFile(folder / "service.log")
        self.service = Service(spec, ServicePorts(self.log, self.notices.append, SystemClock()))
        self.task = asyncio.create_task(self.service.run())

    async def told(self, text: str) -> Notice:
        """Return the first notice that holds `text`, waiting for it."""
        while True:
            for notice in self.notices:
                if text in notice.text:
                    return notice
            await asyncio.sleep(0.01)


@asynccontextmanager
async def stage(folder: Path, spec: ChildSpec) -> AsyncIterator[Stage]:
    """Run `spec` as a service, and end it however the test ends."""
    made = Stage(folder, spec)
    try:
        yield made
    finally:
        await made.service.stop(5.0)
        await made.task
        made.log.close()


async def gone(pid: int) -> None:
    """Return when the process has ended."""
    async with asyncio.timeout(60):
        while alive(pid):  # noqa: ASYNC110 - a process tells nobody but its parent
            await asyncio.sleep(0.01)


async def test_ready_is_the_event_with_its_fields(tmp_path: Path, program: ProgramMaker) -> None:
    """A service is up when it says so, and its lines are in its log."""
    async with stage(tmp_path, program(FOREVER)) as it:
        fields = await it.service.ready()
        assert fields["model"] == "m"
        assert '"ready"' in it.log.path.read_text()


async def test_a_death_before_ready_is_a_start_error_with_its_last_words(tmp_path: Path, program: ProgramMaker) -> None:
    """The reason a service could not start reaches the user in one line, and it is not tried again."""
    source = "say('loading')\nsys.stderr.write('mell: no such model\\n')\nsys.exit(3)\n"
    async with stage(tmp_path, program(source)) as it:
        with pytest.raises(StartError, match=r"service ended with code 3: no such model"):
            await it.service.ready()
        await it.task


async def test_a_program_that_cannot_be_run_is_a_start_error(tmp_path: Path) -> None:
    """A missing interpreter is told like any failed start."""
    async with stage(tmp_path, ChildSpec("service", (str(tmp_path / "nothing"),), {})) as it:
        with pytest.raises(StartError, match="nothing"):
            await it.service.ready()


async def test_a_service_that_dies_later_is_started_again_and_said_so(tmp_path: Path, program: ProgramMaker) -> None:
    """After a kill the user reads what happened and when it goes on, and the service comes back."""
    async with stage(tmp_path, program("say('ready', pid=os.getpid())\nwhile True: time.sleep(1)\n")) as it:
        first = (await it.service.ready())["pid"]
        os.kill(first, signal.SIGKILL)
        died = await it.told("was killed by SIGKILL")
        assert died.level == "error"
        assert "starting it again in 0.5 s" in died.text
        await it.told("is ready again")
        pids = {line.split('"pid": ')[1].rstrip("}") for line in it.log.path.read_text().splitlines()}
        assert len(pids) == 2


async def test_warnings_and_errors_are_shown_the_rest_is_logged(tmp_path: Path, program: ProgramMaker) -> None:
    """Only lines of level warning and above reach the user."""
    source = "say('quiet')\nsay('loud', 'warning', n=1)\nprint('plain', flush=True)\n" + FOREVER
    async with stage(tmp_path, program(source)) as it:
        await it.service.ready()
        assert [(notice.text, notice.level) for notice in it.notices] == [("loud n=1", "warning")]
        assert len(it.log.path.read_text().splitlines()) == 4


async def test_stop_asks_first(tmp_path: Path, program: ProgramMaker) -> None:
    """SIGTERM reaches the program, which ends in its own way within the deadline."""
    source = "signal.signal(signal.SIGTERM, lambda *_: (say('bye'), sys.exit(0)))\n" + FOREVER
    async with stage(tmp_path, program(source)) as it:
        await it.service.ready()
        await it.service.stop(60.0)
        assert '"bye"' in it.log.path.read_text()
        assert it.notices == []


async def test_stop_kills_what_does_not_listen(tmp_path: Path, program: ProgramMaker) -> None:
    """A program that ignores SIGTERM is killed at the deadline, and the user reads it."""
    source = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + FOREVER.replace("model='m'", "pid=os.getpid()")
    async with stage(tmp_path, program(source)) as it:
        pid = (await it.service.ready())["pid"]
        await it.service.stop(0.05)
        assert not alive(pid)
        assert "was killed" in it.notices[-1].text


async def test_stop_during_the_pause_before_a_restart_ends_it(
    tmp_path: Path, program: ProgramMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service that waits to be started again is not started once the stack stops, however long it would wait."""
    monkeypatch.setattr(service_module, "next_delay_us", lambda *_: 3_600_000_000)
    async with stage(tmp_path, program("say('ready')\nsys.exit(1)\n")) as it:
        await it.told("starting it again")
        await it.service.stop(1.0)
        await it.task
        assert len(it.log.path.read_text().splitlines()) == 1


async def test_stop_while_the_program_is_being_started_leaves_nothing(tmp_path: Path, program: ProgramMaker) -> None:
    """A stop that comes before the process exists still ends it."""
    async with stage(tmp_path, program(FOREVER)) as it:
        await asyncio.sleep(0)
        await it.service.stop(1.0)
        await asyncio.wait_for(it.task, 60)


async def test_what_a_dead_child_left_running_is_killed(program: ProgramMaker) -> None:
    """A grandchild does not outlive its parent, nor hold its output open."""
    source = (
        "import subprocess\n"
        "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']).pid, flush=True)\n"
        "sys.exit(0)\n"
    )
    lines: list[str] = []
    child = await Child.start(program(source), lines.append)
    assert await child.wait() == 0
    grandchild = int(lines[0])
    await gone(grandchild)


async def test_long_and_broken_output_is_kept_in_bounds(program: ProgramMaker) -> None:
    """Lines without an end are cut, bytes that are no text are replaced, and nothing blocks."""
    source = "sys.stdout.buffer.write(b'x' * (3 << 20) + b'\\n\\xff\\xfe\\n' + b'tail')\n"
    lines: list[str] = []
    child = await Child.start(program(source), lines.append)
    assert await child.wait() == 0
    assert sum(len(line) for line in lines) == (3 << 20) + 2 + 4
    assert max(len(line) for line in lines) <= (1 << 20) + (1 << 16)
    assert lines[-2:] == ["��", "tail"]


def test_children_die_with_a_parent_that_is_killed(program: ProgramMaker) -> None:
    """A kill -9 of the parent leaves no child behind."""
    source = (
        "import asyncio, os, sys\n"
        "from mell_console.up.child import Child, ChildSpec\n"
        "async def main():\n"
        "    code = 'import os, time; print(os.getpid(), flush=True); time.sleep(600)'\n"
        "    spec = ChildSpec('c', (sys.executable, '-c', code), dict(os.environ))\n"
        "    child = await Child.start(spec, lambda line: print(line, flush=True))\n"
        "    await child.wait()\n"
        "asyncio.run(main())\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert alive(child)
    finally:
        parent.kill()
        parent.communicate()
    deadline = time.monotonic() + 60
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(child)


async def test_a_log_that_cannot_be_written_stops_nobody(tmp_path: Path, program: ProgramMaker) -> None:
    """A full disk costs lines: it is told once, and the service is read on, so that it does not stand still."""
    (tmp_path / "service.log").symlink_to("/dev/full")
    log = LogFile(tmp_path / "service.log")
    notices: list[Notice] = []
    source = "say('one')\nprint('x' * 200_000, flush=True)\nsay('two')\n" + FOREVER
    service = Service(program(source), ServicePorts(log, notices.append, SystemClock()))
    running = asyncio.create_task(service.run())
    assert (await service.ready())["model"] == "m"
    await service.stop(60.0)
    await running
    log.close()
    assert [notice.text for notice in notices] == [f"{log.path} cannot be written: No space left on device"]


async def test_a_stack_keeps_no_log_open_of_workers_that_were_stopped(tmp_path: Path, program: ProgramMaker) -> None:
    """One that scales for weeks would run out of files."""
    settings = UpSettings.from_command_line(["--engine", "fake", "--workers", "1..2"])
    plan = StackPlan(settings, (WorkerPlan("worker-1", "fake", "fake", 1, 1.0),), 1, tmp_path, {})
    stack = Stack(plan, make_screen(Console(file=io.StringIO())), SystemClock())
    stack._launch = SimpleNamespace(worker=lambda part, number: program(FOREVER, name=part.name))  # type: ignore[assignment]

    def logs_open() -> int:
        return sum(file.path.startswith(str(tmp_path)) for file in psutil.Process().open_files())

    for _ in range(3):
        await stack.start_worker("worker-1")
        assert logs_open() == 1
        await stack.stop_worker("worker-1")
        async with asyncio.timeout(60):
            while logs_open() or stack._tasks:  # noqa: ASYNC110 - closing a file sets no event
                await asyncio.sleep(0.01)
    await stack.stop()


def test_a_log_turns_over_when_it_is_full(tmp_path: Path) -> None:
    """Two files of bounded size hold the newest lines."""
    log = LogFile(tmp_path / "a.log", largest_bytes=100)
    for number in range(40):
        log.write(f"line {number}")
    log.close()
    log.close()
    kept = (tmp_path / "a.log.1").read_text() + (tmp_path / "a.log").read_text()
    assert kept.endswith("line 39\n")
    assert all(path.stat().st_size < 120 for path in tmp_path.iterdir())
    assert len(list(tmp_path.iterdir())) == 2
