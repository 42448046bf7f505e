"""Both ends of a migration as tables: phase and event give the next phase and what is to be done.

A sequence runs at its *source* and is to go on at its *target*; its frontend decides between them. What makes this
safe, whatever is lost, late or repeated:

- The target publishes nothing before the frontend has granted its claim, and the claim names exactly the ids it holds.
- The source stops before it names the last of these ids, and frees nothing before it knows that it no longer owns the
  sequence: by the target's answer, or by the frontend's.
- Not knowing, it asks the frontend that the claim never be granted. Going on without an answer would also be safe,
  for a claim that was granted fences its tokens off: so it waits only `ask_us`.
- The target frees nothing that a claim under way may yet be granted for, until the claim's deadline.

The tables know no ids, blocks, links or messages: `source` and `target` notice what happened, ask `transition` what
that means, and do it. An event that a phase lacks is a bug here, never a peer's fault: what comes late or from
strangers is sorted out before it gets this far.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Generic, NamedTuple, TypeVar

from mell_gpu_worker.core.migration.limits import MoveLimits


class SourcePhase(StrEnum):
    """Where a migration stands at its source; the sequence decodes except in the four phases from STOPPING on."""

    RESERVING = "reserving"
    """The target has been asked for room."""
    COPYING = "copying"
    """KV travels, or the target prefills, or both, while the sequence decodes."""
    STOPPING = "stopping"
    """No further step includes the sequence; the one under way may."""
    SENDING = "sending the rest"
    """The sequence stands still; its last blocks travel."""
    COMMITTING = "committing"
    """The target was told all ids, and asks the frontend."""
    ASKING = "asking"
    """The target has refused or not answered: the frontend is asked who owns the sequence."""
    RESUMED = "resumed"
    """The frontend has not answered either: the sequence goes on, the frontend is asked on."""
    OVER = "over"


class SourceEvent(StrEnum):
    """What happens to a migration at its source."""

    RESERVED = "reserved"
    REFUSED = "refused"
    UNANSWERED = "unanswered"
    LINK_FAILED = "link failed"
    LOST = "sequence ended or preempted"
    LATE = "too late"
    TAIL_SMALL = "little is left"
    STOPPED = "stopped"
    ALL_SENT = "all sent"
    GRANTED = "granted"
    OWNED = "source still owns it"
    DISOWNED = "source does not own it"
    PAUSE_OVER = "pause over"


class TargetPhase(StrEnum):
    """Where a migration stands at its target."""

    OFFERING = "offering"
    """Room is held; its transport makes an offer of it."""
    RESERVED = "reserved"
    """Blocks are being filled, by the source or by prefill."""
    JOINING = "joining"
    """The source has stopped and said all; the last of it is not in place yet."""
    CLAIMING = "claiming"
    """The frontend has been asked; the sequence is computed, nothing of it is published."""
    SETTLING = "settling"
    """The sequence is owned here; its first token is awaited, to tell what the move took."""
    OVER = "over"


class TargetEvent(StrEnum):
    """What happens to a migration at its target."""

    OFFERED = "offered"
    HEARD = "heard of the source"
    COMMITTED = "commit came"
    READY = "all in place"
    GRANTED = "granted"
    REFUSED = "refused"
    UNANSWERED = "unanswered"
    PAUSE_OVER = "pause over"
    FIRST_OUTPUT = "first token"
    RELEASED = "released"
    LINK_FAILED = "link failed"
    LOST = "short of blocks, superseded, stopping"
    LATE = "too late"


class Act(StrEnum):
    """What a transition wants done, in this order."""

    STOP = "stop the sequence"
    RESUME = "resume the sequence"
    COMMIT = "CommitMigration"
    ABORT = "AbortMigration"
    FREE = "free"
    CLOSE = "close the link"
    RELEASE = "ReleaseKv"
    FAIL = "MigrationFailed"
    TELL_RESERVED = "KvReserved"
    START = "compute"
    CLAIM = "Claim"
    ADOPT = "publish from accepted"
    TELL_GRANTED = "CommitGranted"
    REFUSE = "refuse"
    TELL_COMMITTED = "MigrationCommitted"
    PAUSE = "pause"


P = TypeVar("P", SourcePhase, TargetPhase)
E = TypeVar("E", SourceEvent, TargetEvent)


class Way(NamedTuple, Generic[P]):
    """Where an event leads, and what is to be done on the way."""

    phase: P
    acts: tuple[Act, ...] = ()


Table = Mapping[P, Mapping[E, Way[P]]]

_S, _SE, _T, _TE = SourcePhase, SourceEvent, TargetPhase, TargetEvent

_CALLED_OFF = Way(_S.OVER, (Act.CLOSE, Act.RELEASE, Act.FAIL))
_ROLLED_BACK = Way(_S.OVER, (Act.RESUME, Act.CLOSE, Act.RELEASE, Act.FAIL))
_LEFT = Way(_S.OVER, (Act.FREE, Act.CLOSE))
_UNDECIDED_END = Way(_S.OVER, (Act.CLOSE, Act.RELEASE))
"""The sequence is gone from here while somebody else decides: whether it moved is the target's to tell."""

SOURCE: Table[SourcePhase, SourceEvent] = {
    _S.RESERVING: {
        _SE.RESERVED: Way(_S.COPYING),
        _SE.REFUSED: Way(_S.OVER, (Act.FAIL,)),
        _SE.UNANSWERED: Way(_S.OVER, (Act.RELEASE, Act.FAIL)),
        _SE.LOST: Way(_S.OVER, (Act.RELEASE, Act.FAIL)),
    },
    _S.COPYING: {
        _SE.TAIL_SMALL: Way(_S.STOPPING, (Act.STOP,)),
        _SE.REFUSED: _CALLED_OFF,
        _SE.UNANSWERED: _CALLED_OFF,
        _SE.LINK_FAILED: _CALLED_OFF,
        _SE.LOST: _CALLED_OFF,
        _SE.LATE: _CALLED_OFF,
    },
    _S.STOPPING: {
        _SE.STOPPED: Way(_S.SENDING),
        _SE.LINK_FAILED: _ROLLED_BACK,
        _SE.LOST: _CALLED_OFF,
    },
    _S.SENDING: {
        _SE.ALL_SENT: Way(_S.COMMITTING, (Act.COMMIT,)),
        _SE.LINK_FAILED: _ROLLED_BACK,
        _SE.LOST: _CALLED_OFF,
    },
    _S.COMMITTING: {
        _SE.GRANTED: _LEFT,
        _SE.REFUSED: Way(_S.ASKING, (Act.ABORT,)),
        _SE.UNANSWERED: Way(_S.ASKING, (Act.ABORT,)),
        _SE.LOST: _UNDECIDED_END,
    },
    _S.ASKING: {
        _SE.OWNED: _ROLLED_BACK,
        _SE.DISOWNED: _LEFT,
        _SE.UNANSWERED: Way(_S.ASKING, (Act.PAUSE,)),
        _SE.PAUSE_OVER: Way(_S.ASKING, (Act.ABORT,)),
        _SE.LATE: Way(_S.RESUMED, (Act.RESUME,)),
        _SE.LOST: _UNDECIDED_END,
    },
    _S.RESUMED: {
        _SE.OWNED: _CALLED_OFF,
        _SE.DISOWNED: _LEFT,
        _SE.UNANSWERED: Way(_S.RESUMED, (Act.PAUSE,)),
        _SE.PAUSE_OVER: Way(_S.RESUMED, (Act.ABORT,)),
        _SE.LOST: _UNDECIDED_END,
    },
    _S.OVER: {},
}

_DROPPED = Way(_T.OVER, (Act.FREE, Act.CLOSE, Act.REFUSE))
_HELD_ENDS = {
    _TE.RELEASED: _DROPPED,
    _TE.LINK_FAILED: _DROPPED,
    _TE.LOST: _DROPPED,
    _TE.LATE: _DROPPED,
}
_DISCARDED = Way(_T.OVER, (Act.FREE, Act.REFUSE))
_SETTLED = Way(_T.OVER, (Act.TELL_COMMITTED,))

TARGET: Table[TargetPhase, TargetEvent] = {
    _T.OFFERING: {_TE.OFFERED: Way(_T.RESERVED, (Act.TELL_RESERVED,)), **_HELD_ENDS},
    _T.RESERVED: {_TE.HEARD: Way(_T.RESERVED), _TE.COMMITTED: Way(_T.JOINING), **_HELD_ENDS},
    _T.JOINING: {
        _TE.HEARD: Way(_T.JOINING),
        _TE.READY: Way(_T.CLAIMING, (Act.START, Act.CLOSE, Act.CLAIM)),
        **_HELD_ENDS,
    },
    _T.CLAIMING: {
        _TE.GRANTED: Way(_T.SETTLING, (Act.ADOPT, Act.TELL_GRANTED)),
        _TE.REFUSED: _DISCARDED,
        _TE.UNANSWERED: Way(_T.CLAIMING, (Act.PAUSE,)),
        _TE.PAUSE_OVER: Way(_T.CLAIMING, (Act.CLAIM,)),
        _TE.RELEASED: Way(_T.CLAIMING),
        _TE.LOST: _DISCARDED,
        _TE.LATE: _DISCARDED,
    },
    _T.SETTLING: {_TE.FIRST_OUTPUT: _SETTLED, _TE.LOST: _SETTLED, _TE.LATE: _SETTLED},
    _T.OVER: {},
}


@dataclass(frozen=True, slots=True)
class Standing(Generic[P]):
    """A migration's state at one end: its phase, when that is too late, when a pause in it is over."""

    phase: P
    until_us: int | None = None
    again_us: int | None = None


@dataclass(frozen=True, slots=True)
class Role(Generic[P, E]):
    """One end of a migration: its table, and the limit (by name) on how long it stays in a phase."""

    name: str
    table: Table[P, E]
    first: P
    patience: Mapping[P, str]
    late: E
    pause_over: E
    renewing: E | None = None
    """An event that makes a phase's time begin anew."""


SOURCE_ROLE: Role[SourcePhase, SourceEvent] = Role(
    "source",
    SOURCE,
    _S.RESERVING,
    {_S.COPYING: "move_us", _S.ASKING: "ask_us"},
    _SE.LATE,
    _SE.PAUSE_OVER,
)
TARGET_ROLE: Role[TargetPhase, TargetEvent] = Role(
    "target",
    TARGET,
    _T.OFFERING,
    {
        _T.OFFERING: "idle_us",
        _T.RESERVED: "idle_us",
        _T.JOINING: "idle_us",
        _T.CLAIMING: "claim_deadline_us",
        _T.SETTLING: "claim_deadline_us",
    },
    _TE.LATE,
    _TE.PAUSE_OVER,
    _TE.HEARD,
)


def begin(role: Role[P, E], now_us: int, limits: MoveLimits) -> Standing[P]:
    """Return the state that a migration begins in."""
    return Standing(role.first, _until(role, role.first, now_us, limits))


def transition(
    role: Role[P, E], state: Standing[P], event: E, now_us: int, limits: MoveLimits
) -> tuple[Standing[P], tuple[Act, ...]]:
    """Return the state after `event`, and what is to be done; an event that the phase lacks is a bug."""
    ways = role.table[state.phase]
    assert event in ways, (
        f"a migration's {role.name} that is {state.phase} cannot take {event!r}; "
        f"it could take {', '.join(ways) or 'nothing'}"
    )
    phase, acts = ways[event]
    if phase is not state.phase:
        return Standing(
            phase, _until(role, phase, now_us, limits), state.again_us if _asks(role, phase) else None
        ), acts
    if event is role.renewing:
        return replace(state, until_us=_until(role, phase, now_us, limits)), acts
    if Act.PAUSE in acts:
        return replace(state, again_us=now_us + limits.ask_pause_us), acts
    # What else comes during a pause does not end it, or nobody would ask again.
    return replace(state, again_us=None if event is role.pause_over else state.again_us), acts


def due(role: Role[P, E], state: Standing[P], now_us: int) -> E | None:
    """Return what time alone makes happen now, if anything."""
    if state.until_us is not None and now_us >= state.until_us:
        return role.late
    if state.again_us is not None and now_us >= state.again_us:
        return role.pause_over
    return None


def _asks(role: Role[P, E], phase: P) -> bool:
    return role.pause_over in role.table[phase]


def _until(role: Role[P, E], phase: P, now_us: int, limits: MoveLimits) -> int | None:
    name = role.patience.get(phase)
    return None if name is None else now_us + getattr(limits, name)


def diagram(role: Role[P, E]) -> str:
    """Return the table as a mermaid state diagram, for the README."""
    lines: list[str] = ["stateDiagram-v2", f"    [*] --> {_name(role.first)}"]
    for phase, ways in role.table.items():
        together: dict[Way[P], list[str]] = {}
        for event, way in ways.items():
            together.setdefault(way, []).append(str(event))
        lines.extend(_arrow(phase, way, events) for way, events in together.items())
    return "\n".join([*lines, "    over --> [*]"])


def _arrow(phase: P, way: Way[P], events: list[str]) -> str:
    acts = f" / {', '.join(way.acts)}" if way.acts else ""
    return f"    {_name(phase)} --> {_name(way.phase)}: {'; '.join(events)}{acts}".replace("; ", " or ")


def _name(phase: SourcePhase | TargetPhase) -> str:
    return phase.value.replace(" ", "_")
