"""What `mell up` shows: a line for each step with its time, and notices; plain lines where there is no terminal."""

import time
from typing import Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.text import Text

_STYLES = {"warning": "yellow", "error": "red", "critical": "red", "info": "dim"}


class Screen(Protocol):
    """Where progress is shown. Steps run side by side; each is begun once and ended once."""

    def begin(self, step: str) -> None:
        """Show that `step` has begun."""
        ...

    def update(self, step: str, detail: str) -> None:
        """Show how far `step` is."""
        ...

    def end(self, step: str, detail: str) -> None:
        """Show that `step` is done and how long it took."""
        ...

    def say(self, text: str, level: str = "") -> None:
        """Show one line (or more), never wrapped, so that it can be copied."""
        ...

    def close(self) -> None:
        """Stop drawing; lines said before stay; safe to repeat."""
        ...


class PlainScreen:
    """One plain line for each thing, for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._begun_s: dict[str, float] = {}

    def begin(self, step: str) -> None:
        """Say nothing yet: the end says it with its time."""
        self._begun_s[step] = time.monotonic()

    def update(self, step: str, detail: str) -> None:
        """Say nothing: a log needs no percentages."""

    def end(self, step: str, detail: str) -> None:
        """Print the step, its outcome and its time."""
        took_s = time.monotonic() - self._begun_s.pop(step)
        self.say(f"{step}: {detail} ({took_s:.1f} s)")

    def say(self, text: str, level: str = "") -> None:
        """Print the text, warnings and errors marked."""
        marked = f"{level}: {text}" if level in {"warning", "error", "critical"} else text
        self._console.out(marked, highlight=False)

    def close(self) -> None:
        """Nothing is being drawn."""


class _SecondsColumn(ProgressColumn):
    """How long a step has taken, to a tenth of a second."""

    def render(self, task: Task) -> Text:
        """Return the time since the step began, or that it took."""
        took_s = task.finished_time if task.finished else task.elapsed
        return Text(f"{took_s or 0.0:.1f} s", style="dim")


class TerminalScreen:
    """A spinner for each step that runs, its time, and a tick when it is done."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            SpinnerColumn(finished_text="[green]✓[/green]"),
            TextColumn("{task.description}"),
            TextColumn("[dim]{task.fields[detail]}[/dim]"),
            _SecondsColumn(),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}
        self._progress.start()

    def begin(self, step: str) -> None:
        """Add a line with a spinner."""
        self._tasks[step] = self._progress.add_task(escape(step), total=1, detail="")

    def update(self, step: str, detail: str) -> None:
        """Change the line's text."""
        self._progress.update(self._tasks[step], detail=escape(detail))

    def end(self, step: str, detail: str) -> None:
        """Tick the line."""
        self._progress.update(self._tasks[step], completed=1, detail=escape(detail))

    def say(self, text: str, level: str = "") -> None:
        """Print above the lines being drawn."""
        self._console.print(text, style=_STYLES.get(level, ""), markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Stop drawing; the ticked lines stay on the terminal."""
        self._progress.stop()


def make_screen(console: Console) -> Screen:
    """Return the screen that suits where `console` writes."""
    return TerminalScreen(console) if console.is_terminal else PlainScreen(console)
