"""A reader who does what a page says: in a folder that looks like a fresh clone, with `mell` and `python` at hand."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

from mell_shared.process import death_with_parent
from tests.docs.pages import Block
from tests.ports import free_port

ROOT = Path(__file__).parents[2]
_PATIENCE_S = 180.0
"""Only ends a test that has failed."""
_STOP_S = 90.0
_PORTS = ("8000", "8001", "4222", "9100")
"""Ports that pages name; each reader has free ones in their place."""


class Reader:
    """Runs blocks one after the other; everything started is ended when the context is left."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "mell"
        self._logs = folder
        self._running: list[tuple[subprocess.Popen[bytes], Path]] = []
        self._ports = {port: str(free_port()) for port in _PORTS}
        self._environment = self._make_environment(folder)
        self._folder.mkdir()
        for path in ROOT.iterdir():
            if not path.name.startswith(".") and path.name not in {"wheels", "build", "dist"}:
                (self._folder / path.name).symlink_to(path)

    def __enter__(self) -> "Reader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The last started first: a stack's parts stand on those before them.
        codes = [_stop(process) for process, _ in reversed(self._running)]
        if error is None:
            assert set(codes) <= {0}, f"something did not end as Ctrl-C should end it: {codes}"

    def run(self, block: Block) -> None:
        """Do what a block says; raises `AssertionError` with all that it printed."""
        text = self._with_own_ports(block.text)
        if block.file:
            (self._folder / block.file).write_text(text)
        elif block.until:
            self._start(block, text)
        else:
            self._run_to_end(block, text)

    def _run_to_end(self, block: Block, text: str) -> None:
        done = subprocess.run(
            self._command(block, text),
            cwd=self._folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_PATIENCE_S,
            check=False,
        )
        assert done.returncode == block.code, f"line {block.line}: code {done.returncode}\n{text}\n{done.stdout}"
        assert "Traceback" not in done.stdout, f"line {block.line}:\n{done.stdout}"

    def _start(self, block: Block, text: str) -> None:
        log = self._logs / f"running-{len(self._running)}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                self._command(block, text.strip()),
                cwd=self._folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=death_with_parent(signal.SIGTERM),  # noqa: PLW1509 - one system call, allocates nothing
            )
        self._running.append((process, log))
        deadline_s = time.monotonic() + _PATIENCE_S
        while block.until not in log.read_text(errors="replace"):  # it may be writing
            assert process.poll() is None, f"line {block.line}: it ended\n{log.read_text()}"
            assert time.monotonic() < deadline_s, f"line {block.line}: no {block.until!r}\n{log.read_text()}"
            time.sleep(0.05)

    def _command(self, block: Block, text: str) -> list[str]:
        if block.language == "python":
            return [sys.executable, "-c", text]
        return ["bash", "-eu", "-o", "pipefail", "-c", text]

    def _with_own_ports(self, text: str) -> str:
        for port, own in self._ports.items():
            text = re.sub(rf"(:|port |-p ){port}\b", rf"\g<1>{own}", text)
        return text

    def _make_environment(self, folder: Path) -> dict[str, str]:
        tools = folder / "bin"
        tools.mkdir()
        for name, arguments in {"mell": "-m mell_console", "python": ""}.items():
            (tools / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
            (tools / name).chmod(0o755)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("MELL_")}
        url = f"http://127.0.0.1:{self._ports['8000']}"
        return kept | {
            "PATH": f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "XDG_STATE_HOME": str(folder / "state"),
            "NO_COLOR": "1",
            "MELL_PORT": self._ports["8000"],
            "MELL_URL": url,
            "MELL_BENCH_URL": url,
            "MELL_NATS_URL": "",
            "MELL_PROFILE_S": "0",
            "MELL_FAKE_STEP_US": "5000",
        }


def _stop(process: "subprocess.Popen[bytes]") -> int:
    """Press Ctrl-C and return the exit code."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
    try:
        return process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait()
