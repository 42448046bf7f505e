"""The states of one sequence at its frontend, and every way from one to another, as one table."""

from enum import StrEnum


class State(StrEnum):
    """Where a sequence stands."""

    PLACING = "placing"
    """A `PlaceRequest` is outstanding; nobody owns the sequence."""
    BACKING_OFF = "backing off"
    """Nobody owns it; the scheduler is asked again when the pause is over."""
    SUBMITTING = "submitting"
    """A `Submit` is outstanding; the worker it went to owns this generation, whether it took it or not."""
    STREAMING = "streaming"
    """The owner has the sequence and publishes its tokens."""
    ENDED = "ended"
    """Finished, failed or closed; only its name is remembered for a while."""


class Cause(StrEnum):
    """Why a sequence changes its state."""

    QUEUED = "queued"
    QUEUED_TOO_SOON = "queued too soon"
    PLACED = "placed"
    PLACE_FAILED = "place failed"
    PAUSE_OVER = "pause over"
    ACCEPTED = "accepted"
    REFUSED_HERE = "refused here"
    SUBMIT_LOST = "submit lost"
    OWNER_LOST = "owner lost"
    EVICTED = "evicted"
    CLAIM_GRANTED = "claim granted"
    FINISHED = "finished"
    FAILED = "failed"
    CLOSED = "closed"


TRANSITIONS: dict[State, dict[Cause, State]] = {
    State.PLACING: {
        Cause.QUEUED: State.PLACING,
        Cause.QUEUED_TOO_SOON: State.BACKING_OFF,
        Cause.PLACE_FAILED: State.BACKING_OFF,
        Cause.PLACED: State.SUBMITTING,
        Cause.FAILED: State.ENDED,
        Cause.CLOSED: State.ENDED,
    },
    State.BACKING_OFF: {
        Cause.PAUSE_OVER: State.PLACING,
        Cause.CLOSED: State.ENDED,
    },
    State.SUBMITTING: {
        Cause.ACCEPTED: State.STREAMING,
        Cause.CLAIM_GRANTED: State.STREAMING,
        Cause.REFUSED_HERE: State.PLACING,
        Cause.SUBMIT_LOST: State.PLACING,
        Cause.EVICTED: State.PLACING,
        Cause.FINISHED: State.ENDED,
        Cause.FAILED: State.ENDED,
        Cause.CLOSED: State.ENDED,
    },
    State.STREAMING: {
        Cause.CLAIM_GRANTED: State.STREAMING,
        Cause.OWNER_LOST: State.PLACING,
        Cause.EVICTED: State.PLACING,
        Cause.FINISHED: State.ENDED,
        Cause.FAILED: State.ENDED,
        Cause.CLOSED: State.ENDED,
    },
    State.ENDED: {},
}
"""A cause missing here is illegal in that state. Late or wrong messages are sorted out before they get this far."""

OWNED = frozenset({State.SUBMITTING, State.STREAMING})
"""The states in which a sequence has an owner."""


def next_state(state: State, cause: Cause) -> State:
    """Return where `cause` leads from `state`; a pair that the table lacks is a bug."""
    ways = TRANSITIONS[state]
    assert cause in ways, f"a sequence that is {state} cannot be {cause}; it could be {', '.join(ways) or 'nothing'}"
    return ways[cause]


def diagram() -> str:
    """Return the table as a mermaid state diagram, for the README."""
    lines = ["stateDiagram-v2", "    [*] --> placing"]
    for state, ways in TRANSITIONS.items():
        ends: dict[State, list[str]] = {}
        for cause, target in ways.items():
            ends.setdefault(target, []).append(cause.value)
        lines.extend(f"    {_name(state)} --> {_name(end)}: {', '.join(causes)}" for end, causes in ends.items())
    return "\n".join([*lines, "    ended --> [*]"])


def _name(state: State) -> str:
    return state.value.replace(" ", "_")
