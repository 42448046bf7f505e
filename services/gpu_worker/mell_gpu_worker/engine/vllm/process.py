"""A vLLM server that the worker starts itself, and that ends with it."""

import contextlib
import os
import shlex
import signal
import subprocess

from mell_gpu_worker.engine.base import EngineError
from mell_shared.process import death_with_parent

_STOP_S = 15.0
"""For a server told to stop; then it is killed."""


class ServerProcess:
    """The process of a command. What it writes goes where the worker's own words go."""

    def __init__(self, command: str) -> None:
        self._command = command
        try:
            self._process = subprocess.Popen(  # noqa: S603 - the operator's own command
                shlex.split(command),
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the worker, which still has sequences to finish
                preexec_fn=death_with_parent(signal.SIGTERM),  # noqa: PLW1509 - one system call, allocates nothing
            )
        except (ValueError, IndexError, OSError) as error:
            raise EngineError(f"--vllm-command {command!r} cannot be started: {error}") from error

    def check(self) -> None:
        """Raise `EngineError` if it has ended."""
        code = self._process.poll()
        if code is not None:
            raise EngineError(f"the vLLM server ended with exit code {code}: see its log (--vllm-command)")

    def stop(self) -> None:
        """End it, and at last whatever it has started; blocks until it is gone."""
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_S)
        # A script does not pass the signal on; what it runs would keep the GPU and the port.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
