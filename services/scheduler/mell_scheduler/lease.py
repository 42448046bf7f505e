"""Who leads: the pure side of a lease on one expiring key. It says what to ask of the store next, and when.

Safety rests on three times. The key expires `ttl` after the store *received* its last write; a leader stops
`valid` after it *sent* that write; `valid < ttl`. So a leader has stopped before another can begin, whatever the
network does, as long as clocks run at about the same speed.

| state | event | next | why |
|---|---|---|---|
| following | `Looked` nothing | following, takes at once | the key has expired or never was |
| following | `Looked` another's | following, looks again later | it leads |
| following | `Looked` mine | following, takes at once in a new term | I led, or the answer to my taking got lost |
| following | `Written` in a term that I led | following, takes at once in a new term | the answer came too late |
| following | `Written` | leading | |
| following | `Conflicted`, `Unanswered` | following, looks again later | another was faster, or nobody knows |
| leading | `Written` | leading, renews later | |
| leading | `Unanswered` | leading, renews again soon | the write may have arrived |
| leading | `Conflicted` | leading, looks at once | it may be my own unanswered write that is in the way |
| leading | `Looked` mine | leading, renews at once | |
| leading | `Looked` another's or nothing | following | lost |
| leading | `valid` has passed | following | lost |
"""

import json
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LeaseSettings:
    """Times of the lease, in microseconds; `valid_us` must be under the store's time to live."""

    ttl_us: int = 5_000_000
    valid_us: int = 3_500_000
    renew_us: int = 1_500_000
    retry_us: int = 300_000
    """After an unanswered renewal."""
    poll_us: int = 1_000_000
    """Between two looks at another's lease; the shell adds jitter."""


@dataclass(frozen=True, slots=True)
class LeaseValue:
    """What the key holds. `term` rises whenever leading begins, and travels with a leader's commands.

    Who led, stopped and leads again has forgotten what it numbered in its last term.
    """

    scheduler: str
    term: int

    def to_bytes(self) -> bytes:
        """Return the value as JSON, so that operators can read it."""
        return json.dumps({"scheduler": self.scheduler, "term": self.term}).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> "LeaseValue":
        """Return the value in `data`; anything unreadable is somebody's lease of term 0."""
        try:
            value = json.loads(data)
            return cls(str(value["scheduler"]), int(value["term"]))
        except (ValueError, KeyError, TypeError):
            return cls("", 0)


@dataclass(frozen=True, slots=True)
class Held:
    """The key as it was read."""

    value: LeaseValue
    revision: int


@dataclass(frozen=True, slots=True)
class Looked:
    """The key was read; None: it has no value."""

    held: Held | None


@dataclass(frozen=True, slots=True)
class Written:
    """A write sent at `sent_us` was done."""

    value: LeaseValue
    revision: int
    sent_us: int


@dataclass(frozen=True, slots=True)
class Conflicted:
    """A write was refused: the key is at another revision."""


@dataclass(frozen=True, slots=True)
class Unanswered:
    """The store gave no answer; a write may have been done all the same."""


LeaseEvent = Looked | Written | Conflicted | Unanswered


@dataclass(frozen=True, slots=True)
class Look:
    """Read the key, at `at_us`."""

    at_us: int


@dataclass(frozen=True, slots=True)
class Write:
    """Set the key to `value` if it is at `revision` (0: has no value), at `at_us`."""

    value: LeaseValue
    revision: int
    at_us: int


LeaseCommand = Look | Write


class Lease:
    """One scheduler's side of the lease. `handle` takes what came of the last command and returns the next."""

    def __init__(self, scheduler: str, settings: LeaseSettings) -> None:
        assert settings.renew_us < settings.valid_us < settings.ttl_us, "a leader must stop before its key expires"
        self._scheduler = scheduler
        self._settings = settings
        self._highest_term = 0
        self._led_term = 0
        """The last in which leading began, or was over before it was known."""
        self._held: Held | None = None
        """What is led by, as last known."""
        self._valid_until_us = 0

    def leads(self, now_us: int) -> bool:
        """Whether this scheduler may decide now. To be asked at every decision."""
        return self._held is not None and now_us < self._valid_until_us

    @property
    def valid_until_us(self) -> int:
        """When leading ends unless it is renewed."""
        return self._valid_until_us

    @property
    def held(self) -> Held | None:
        """The key as this leader wrote it last; None while following."""
        return self._held

    def lapse(self, now_us: int) -> bool:
        """Stop leading if the time is up; returns whether it stopped now."""
        if self._held is None or self.leads(now_us):
            return False
        self._held = None
        return True

    def handle(self, event: LeaseEvent, now_us: int, unix_ms: int) -> LeaseCommand:
        """Take an answer of the store (`unix_ms`: the wall clock, for new terms); return what to ask next."""
        self.lapse(now_us)
        match event:
            case Looked():
                return self._looked(event.held, now_us, unix_ms)
            case Written():
                return self._written(event, now_us, unix_ms)
            case Conflicted():
                return Look(now_us if self._held else now_us + self._settings.poll_us)
            case Unanswered():
                return self._again(now_us)

    def _looked(self, held: Held | None, now_us: int, unix_ms: int) -> LeaseCommand:
        if held is not None:
            self._highest_term = max(self._highest_term, held.value.term)
            if held.value.scheduler != self._scheduler:
                self._held = None
                return Look(now_us + self._settings.poll_us)
            if self._held is not None:
                return Write(held.value, held.revision, now_us)
        self._held = None
        return self._take(0 if held is None else held.revision, now_us, unix_ms)

    def _take(self, revision: int, now_us: int, unix_ms: int) -> LeaseCommand:
        return Write(LeaseValue(self._scheduler, max(self._highest_term + 1, unix_ms)), revision, now_us)

    def _written(self, event: Written, now_us: int, unix_ms: int) -> LeaseCommand:
        self._highest_term = max(self._highest_term, event.value.term)
        if self._held is None and event.value.term <= self._led_term:
            return self._take(event.revision, now_us, unix_ms)
        self._led_term = event.value.term
        self._held = Held(event.value, event.revision)
        self._valid_until_us = event.sent_us + self._settings.valid_us
        if self.lapse(now_us):
            return Look(now_us)
        return Write(event.value, event.revision, event.sent_us + self._settings.renew_us)

    def _again(self, now_us: int) -> LeaseCommand:
        if self._held is None:
            return Look(now_us + self._settings.poll_us)
        return Write(self._held.value, self._held.revision, now_us + self._settings.retry_us)
