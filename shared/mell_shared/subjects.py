"""The NATS subjects that the services talk on; every other module takes them from here."""

import re
from dataclasses import dataclass

from mell_shared.bus import InvalidSubjectError

_NAME = re.compile(r"[^\s.*>]+(\.[^\s.*>]+)*")
_PATTERN = re.compile(r"(\*|[^\s.*>]+)(\.(\*|[^\s.*>]+))*(\.>)?|>")


def check_subject(subject: str) -> None:
    """Raise `InvalidSubjectError` unless one can publish on `subject`.

    It must be tokens without space or wildcard, joined by dots. Ids in it come from peers, so this is no assertion.
    """
    if not _NAME.fullmatch(subject):
        raise InvalidSubjectError(f"{subject!r} is no subject")


def check_pattern(pattern: str) -> None:
    """Raise `InvalidSubjectError` unless one can subscribe to `pattern`: a subject, or with `*`, or ending in `>`."""
    if not _PATTERN.fullmatch(pattern):
        raise InvalidSubjectError(f"{pattern!r} is no subject and no pattern of one")


def event_stream(prefix: str) -> str:
    """Return the name of the JetStream stream that keeps the events of a deployment."""
    return "MELL" if prefix == "mell" else f"MELL-{prefix}"


@dataclass(frozen=True, slots=True)
class Subjects:
    """Subject names under one prefix, so that several deployments can share a broker.

    Ids must be subject tokens: no dots, spaces or wildcards (`mell_shared.ids` makes such ids).
    """

    prefix: str = "mell"

    @property
    def place(self) -> str:
        """Placement requests; request/reply, frontends to the leading scheduler."""
        return f"{self.prefix}.scheduler.place"

    @property
    def scheduler_events(self) -> str:
        """Workers' joins, reports, ends; published, workers to every scheduler."""
        return f"{self.prefix}.scheduler.events"

    def worker_commands(self, worker: str) -> str:
        """Commands for one worker incarnation; request/reply."""
        return f"{self.prefix}.worker.{worker}.commands"

    @property
    def all_workers(self) -> str:
        """Commands for every worker at once (`Report` from a new leader); published."""
        return f"{self.prefix}.workers"

    @property
    def all_lanes(self) -> str:
        """Greetings of new workers to all others, which may measure the lane to them; published."""
        return f"{self.prefix}.workers.lanes"

    def worker_lanes(self, worker: str) -> str:
        """Requests to measure the lane to one worker incarnation; request/reply."""
        return f"{self.prefix}.worker.{worker}.lanes"

    def frontend_tokens(self, frontend: str) -> str:
        """Generated tokens for one frontend; published, one message per engine step."""
        return f"{self.prefix}.frontend.{frontend}.tokens"

    def frontend_control(self, frontend: str) -> str:
        """Stream status, claims, evictions for one frontend; request/reply."""
        return f"{self.prefix}.frontend.{frontend}.control"

    def admin(self, kind: str) -> str:
        """An operator's question or order of this kind (`*`: all); request/reply, to the leading scheduler."""
        return f"{self.prefix}.admin.{kind}"

    def event(self, kind: str) -> str:
        """Events of this type for other systems (`>`: all), on JetStream; published by scheduler and frontends."""
        return f"{self.prefix}.events.{kind}"
