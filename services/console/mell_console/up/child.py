"""One child process: tied to this one's life, its output split into lines. Knows nothing of what it runs."""

import asyncio
import contextlib
import errno
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mell_console.up.exits import exited
from mell_shared.process import death_with_parent

_LONGEST_LINE = 1 << 20


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """A program to run: `arguments[0]` is its absolute path; `environment` is all that it sees."""

    name: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str]


class Child:
    """A running program. Its lines go to `on_line` as they come, standard error among standard output."""

    def __init__(self, process: asyncio.subprocess.Process, on_line: Callable[[str], None]) -> None:
        self._process = process
        self._ended = asyncio.create_task(self._run(on_line))

    @classmethod
    async def start(cls, spec: ChildSpec, on_line: Callable[[str], None]) -> "Child":
        """Start `spec` in a session of its own, so that a terminal's Ctrl-C reaches the parent only.

        Call it on the main thread: the child is killed when the thread that started it ends. Raises
        `FileNotFoundError` if it cannot be run.
        """
        if not os.access(spec.arguments[0], os.X_OK):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), spec.arguments[0])
        process = await asyncio.create_subprocess_exec(
            *spec.arguments,
            env=dict(spec.environment),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=death_with_parent(signal.SIGKILL),
        )
        return cls(process, on_line)

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    async def wait(self) -> int:
        """Return the exit code (negative: the signal that killed it) once it has ended and its output is read."""
        return await asyncio.shield(self._ended)

    async def stop(self, deadline_s: float) -> bool:
        """Ask it to stop, kill it after `deadline_s`; return whether it stopped when asked."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(self.wait(), deadline_s)
        except TimeoutError:
            self.kill()
            await self.wait()
            return False
        return True

    def kill(self) -> None:
        """End it, and what it started, at once."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    async def _run(self, on_line: Callable[[str], None]) -> int:
        reading = asyncio.create_task(self._read_lines(on_line))
        await exited(self._process.pid)
        # What it left running could hold the pipe open for ever, and would be an orphan.
        self.kill()
        await reading
        return await self._process.wait()

    async def _read_lines(self, on_line: Callable[[str], None]) -> None:
        assert self._process.stdout is not None, "the child was started with a pipe"
        rest = b""
        while chunk := await self._process.stdout.read(1 << 16):
            *lines, rest = (rest + chunk).split(b"\n")
            if len(rest) > _LONGEST_LINE:
                lines, rest = [*lines, rest], b""
            for line in lines:
                on_line(line.decode(errors="replace"))
        if rest:
            on_line(rest.decode(errors="replace"))
