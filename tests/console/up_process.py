"""`mell up` as a real process, for tests: its lines as they come, and every process it ever had."""

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

WAIT_S = 120.0
"""Only ends a test that has failed."""


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Up:
    """One running `mell up`, its lines as they come, and every process it ever had."""

    def __init__(self, folder: Path, *flags: str, **environment: str) -> None:
        command = [sys.executable, "-m", "mell_console", "up", "--port", "0", *flags]
        own = {"XDG_STATE_HOME": str(folder), "NO_COLOR": "1", "MELL_ENGINE": "fake", **environment}
        self.process = subprocess.Popen(
            command, env={**os.environ, **own}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._folder = str(folder)
        self.lines: list[str] = []
        self.family: dict[int, str] = {}
        self._queue: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def until(self, pattern: str, wait_s: float = WAIT_S) -> re.Match[str]:
        """Return the first further line that `pattern` is found in."""
        deadline_s = time.monotonic() + wait_s
        while (line := self._queue.get(timeout=max(0.01, deadline_s - time.monotonic()))) is not None:
            if found := re.search(pattern, line):
                return found
        raise AssertionError(f"no line with {pattern!r} before the end of: {self.text}")

    def up(self, wait_s: float = WAIT_S) -> str:
        """Wait until it is up and return its URL."""
        url = self.until(r"Mell answers at (http://\S+)/v1", wait_s)[1]
        self.meet()
        return url

    def meet(self) -> None:
        """Remember the processes it has now."""
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # it has ended since
                self.family[child.pid] = " ".join(child.cmdline())

    def child(self, words: str) -> int:
        """Return the process id of the child whose command line holds `words`."""
        return next(pid for pid, command in self.family.items() if words in command)

    def end(self, number: signal.Signals) -> int:
        """Send a signal and return the exit code."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """Return the exit code once it has ended and all is read."""
        code = self.process.wait(WAIT_S)
        self._reader.join()
        return code

    def gone(self) -> bool:
        """Return whether none of its processes is left, waiting for the kernel's signals to arrive."""
        deadline_s = time.monotonic() + WAIT_S
        while any(map(alive, self.family)) and time.monotonic() < deadline_s:
            time.sleep(0.01)
        return not any(map(alive, self.family))

    def left(self) -> list[str]:
        """Return the processes that were started for it and run on, whoever's children they are by now."""
        deadline_s = time.monotonic() + WAIT_S
        while (found := self._still_here()) and time.monotonic() < deadline_s:
            time.sleep(0.01)
        return found

    def _still_here(self) -> list[str]:
        names = []
        for process in psutil.process_iter():
            with suppress(psutil.NoSuchProcess):  # it has ended since
                if self._started(process):
                    names.append(process.name())
        return names

    def _started(self, process: psutil.Process) -> bool:
        try:
            return alive(process.pid) and process.environ().get("XDG_STATE_HOME") == self._folder
        except psutil.Error:
            return False

    @property
    def text(self) -> str:
        """All that it printed so far."""
        return "\n".join(self.lines)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            self._queue.put(line)
        self._queue.put(None)


Starter = Callable[..., Up]
