"""The port to distributed tracing: what services say of their work, and how a trace goes on in another process.

Off unless configured; then `mell_shared.otel` carries it out. A trace goes on by the W3C `traceparent`, a text, which
requests bring as a header and messages carry as a field. Cores know nothing of it.
"""

from collections.abc import Mapping
from typing import Literal, Protocol

Attributes = Mapping[str, str | int | float | bool]
Kind = Literal["internal", "server", "client"]


class Span(Protocol):
    """One piece of work, from its start to `end`."""

    @property
    def traceparent(self) -> str:
        """What makes another span, anywhere, a child of this one; empty if nothing is traced."""
        ...

    def set(self, attributes: Attributes) -> None:
        """Say more of it."""
        ...

    def event(self, name: str, ago_us: int = 0) -> None:
        """Say that something happened in it, so long ago."""
        ...

    def end(self, error: str = "") -> None:
        """It is over; `error` says in one word why it failed. Safe to repeat."""
        ...


class Tracer(Protocol):
    """Makes spans; never blocks, never fails."""

    @property
    def on(self) -> bool:
        """Whether anything is traced at all."""
        ...

    def start(
        self,
        name: str,
        parent: str = "",
        attributes: Attributes | None = None,
        *,
        kind: Kind = "internal",
        ago_us: int = 0,
    ) -> Span:
        """Begin a span that began `ago_us` ago; `parent` is a traceparent, anything else makes a new trace."""
        ...

    async def close(self) -> None:
        """Send what is left; takes a few seconds where no collector answers."""
        ...


class _NoSpan:
    """A span of nothing."""

    traceparent = ""

    def set(self, attributes: Attributes) -> None:
        """Forget it."""

    def event(self, name: str, ago_us: int = 0) -> None:
        """Forget it."""

    def end(self, error: str = "") -> None:
        """Forget it."""


_NO_SPAN = _NoSpan()


class NoTracer:
    """Traces nothing."""

    on = False

    def start(
        self,
        name: str,
        parent: str = "",
        attributes: Attributes | None = None,
        *,
        kind: Kind = "internal",
        ago_us: int = 0,
    ) -> Span:
        """Return a span of nothing."""
        return _NO_SPAN

    async def close(self) -> None:
        """Nothing is left."""


NO_TRACER = NoTracer()


def trace_of(traceparent: str) -> str:
    """Return the id of the trace that a traceparent belongs to; empty if it is none."""
    parts = traceparent.split("-")
    return parts[1] if len(parts) == 4 else ""
