"""One supervised service: started, waited for, and started again with growing delays when it dies."""

import asyncio
import signal
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mell_console.up.backoff import next_delay_us
from mell_console.up.child import Child, ChildSpec
from mell_console.up.logfile import LogFile
from mell_console.up.loglines import LogLine, last_words, parse_line
from mell_shared.clock import Clock
from mell_shared.process import StartError

_LINES_KEPT = 200
_CANNOT_RUN = 127  # as a shell says it


@dataclass(frozen=True, slots=True)
class Notice:
    """Something about a service that the user should see."""

    service: str
    text: str
    level: str = "warning"


@dataclass(frozen=True, slots=True)
class ServicePorts:
    """What a service talks to: its log, the user, the clock."""

    log: LogFile
    notify: Callable[[Notice], None]
    clock: Clock


class Service:
    """Keeps one program running. `run` is its task; `ready` waits for its first start; `stop` ends both."""

    def __init__(self, spec: ChildSpec, ports: ServicePorts) -> None:
        self.spec = spec
        self._ports = ports
        self._child: Child | None = None
        self._lines: deque[LogLine] = deque(maxlen=_LINES_KEPT)
        self._first_ready: asyncio.Future[Mapping[str, Any]] = asyncio.get_running_loop().create_future()
        self._stopping = asyncio.Event()
        self._unlogged = False
        """The last line found no place in the log."""

    @property
    def name(self) -> str:
        """The service's name in notices and logs."""
        return self.spec.name

    async def ready(self) -> Mapping[str, Any]:
        """Return the fields of the first `ready` event; raises `StartError` if the process dies before."""
        return await asyncio.shield(self._first_ready)

    async def run(self) -> None:
        """Run the program until `stop`; a first start that fails is not repeated, `ready` raises it."""
        delay_us = 0
        while not self._stopping.is_set():
            code, ran_us = await self._run_once()
            if self._stopping.is_set():
                return
            if not self._first_ready.done():
                self._first_ready.set_exception(StartError(f"{self.name} {_how(code)}: {self._last_words()}"))
                self._first_ready.exception()  # counts as seen: another service's failure may be told instead
                return
            delay_us = next_delay_us(delay_us, ran_us)
            text = f"{_how(code)} ({self._last_words()}); starting it again in {delay_us / 1e6:g} s"
            self._notify(text, "error")
            await self._pause(delay_us)

    async def stop(self, deadline_s: float) -> None:
        """Stop the program and do not start it again; killed after `deadline_s`. Safe to repeat."""
        self._stopping.set()
        if self._child is not None and not await self._child.stop(deadline_s):
            self._notify(f"did not stop within {deadline_s:g} s and was killed", "warning")
        self._first_ready.cancel()

    def kill(self) -> None:
        """End the program at once and do not start it again."""
        self._stopping.set()
        if self._child is not None:
            self._child.kill()

    async def _run_once(self) -> tuple[int, int]:
        started_us = self._ports.clock.now_us()
        self._lines.clear()
        try:
            self._child = await Child.start(self.spec, self._heard)
        except OSError as error:
            self._heard(f"cannot run {self.spec.arguments[0]}: {error.strerror}")
            return _CANNOT_RUN, 0
        if self._stopping.is_set():  # `stop` came while the child was being made, and could not see it
            await self._child.stop(0)
        code = await self._child.wait()
        return code, self._ports.clock.now_us() - started_us

    async def _pause(self, delay_us: int) -> None:
        try:
            await asyncio.wait_for(self._stopping.wait(), delay_us / 1e6)
        except TimeoutError:
            return

    def _heard(self, text: str) -> None:
        self._write(text)
        line = parse_line(text)
        self._lines.append(line)
        if line.level and line.event == "ready":
            self._became_ready(line)
        elif line.loud:
            self._notify(line.summary(), line.level)

    def _write(self, text: str) -> None:
        """Keep a line, or tell once why not: a service that is not read stands still."""
        try:
            self._ports.log.write(text)
        except OSError as error:
            if not self._unlogged:
                self._notify(f"{self._ports.log.path} cannot be written: {error.strerror}", "error")
            self._unlogged = True
        else:
            self._unlogged = False

    def _became_ready(self, line: LogLine) -> None:
        if not self._first_ready.done():
            self._first_ready.set_result(line.fields)
        else:
            self._notify("is ready again", "info")

    def _last_words(self) -> str:
        return f"{last_words(tuple(self._lines))} (all of it in {self._ports.log.path})"

    def _notify(self, text: str, level: str) -> None:
        self._ports.notify(Notice(self.name, text, level))


def _how(code: int) -> str:
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with code {code}"
