"""The file that takes every event of the core; losing it must never stop the scheduler."""

from collections.abc import Callable
from io import TextIOWrapper
from pathlib import Path

import structlog

from mell_scheduler.core import Event, Tick
from mell_scheduler.core.journal import event_line
from mell_shared.process import StartError


class EventLog:
    """Appends lines to a new file; a write that fails ends the log, with a warning. Blocks for disk writes."""

    def __init__(self, path: Path, header: str) -> None:
        try:
            self._file: TextIOWrapper | None = path.open("w", encoding="utf-8")
        except OSError as error:
            raise StartError(f"cannot write the event log {path} ({error.strerror}); set MELL_EVENT_LOG") from error
        self._path = path
        self._write(header)

    def record(self, event: Event, now_us: int) -> None:
        """Write one event; what was written reaches the disk by the next tick."""
        self._write(event_line(event, now_us))
        if isinstance(event, Tick) and self._file is not None:
            self._guard(self._file.flush)

    def close(self) -> None:
        """Write what is left; safe to repeat."""
        if self._file is not None:
            self._guard(self._file.close)
            self._file = None

    def _write(self, line: str) -> None:
        file = self._file
        if file is not None:
            self._guard(lambda: file.write(f"{line}\n"))

    def _guard(self, write: Callable[[], object]) -> None:
        try:
            write()
        except OSError as error:
            structlog.get_logger().warning("event_log_ended", path=str(self._path), reason=error.strerror)
            self._file = None
