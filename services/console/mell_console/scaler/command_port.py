"""Workers started and stopped by somebody's program: compose, Kubernetes, Slurm. It gets its orders as arguments."""

import asyncio
import contextlib
import os
import shlex
import signal
import tempfile
from collections.abc import Mapping, Sequence
from typing import IO

from mell_console.scaler.loop import ScaleError
from mell_console.scaler.values import StartWorkers, StopWorker
from mell_shared.process import death_with_parent

_SHOWN_BYTES = 300


class CommandPort:
    """Runs `arguments` once for each order, one at a time, with what docs/scaling.md says added to both."""

    def __init__(self, arguments: Sequence[str], model: str, timeout_s: float) -> None:
        self._arguments = tuple(arguments)
        self._model = model
        self._timeout_s = timeout_s
        self._one = asyncio.Lock()

    async def start(self, order: StartWorkers) -> None:
        """See `Port`; returns when the program has ended, which may be before the workers are there."""
        try:
            await self._run("start", order.count, order.names, {"MELL_SCALER_NAMES": " ".join(order.names)})
        except ScaleError as error:
            raise ScaleError(str(error), len(order.names)) from error

    async def stop(self, order: StopWorker) -> None:
        """See `Port`."""
        who = {"MELL_SCALER_NAMES": order.name, "MELL_SCALER_HOST": order.host, "MELL_SCALER_WORKER": order.worker}
        await self._run("stop", order.count, (order.name,), who)

    async def _run(self, action: str, count: int, names: Sequence[str], more: Mapping[str, str]) -> None:
        arguments = (*self._arguments, action, str(count), *names)
        given = {
            "MELL_SCALER_ACTION": action,
            "MELL_SCALER_COUNT": str(count),
            "MELL_SCALER_MODEL": self._model,
            **more,
        }
        try:
            # A file, since a worker that the program leaves running would hold a pipe open.
            with tempfile.TemporaryFile() as output:
                async with self._one:
                    process = await asyncio.create_subprocess_exec(
                        *arguments,
                        env={**os.environ, **given},
                        stdin=asyncio.subprocess.DEVNULL,
                        stdout=output,
                        stderr=asyncio.subprocess.STDOUT,
                        start_new_session=True,
                        preexec_fn=death_with_parent(signal.SIGKILL),
                    )
                    await self._ended(process, shown := shlex.join(arguments))
                if process.returncode:
                    raise ScaleError(f"{shown} ended with code {process.returncode}: {_last_words(output)}")
        except OSError as error:
            raise ScaleError(f"cannot run {arguments[0]}: {error.strerror}") from error

    async def _ended(self, process: asyncio.subprocess.Process, shown: str) -> None:
        """Wait for the end, for so long; whoever is cancelled or out of patience kills it and what it started."""
        try:
            async with asyncio.timeout(self._timeout_s):
                await process.wait()
        except TimeoutError as error:
            raise ScaleError(f"{shown} took longer than {self._timeout_s:g} s and was killed") from error
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()  # else its end may come when the event loop is closed


def _last_words(output: IO[bytes]) -> str:
    output.seek(max(0, output.seek(0, os.SEEK_END) - _SHOWN_BYTES))
    lines = output.read().decode(errors="replace").split("\n")
    return " / ".join(line.strip() for line in lines if line.strip()) or "it said nothing"
