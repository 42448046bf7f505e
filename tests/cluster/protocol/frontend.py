"""What the frontend does in the model: the real rules of arbitration on a record of the same fields."""

from typing import Any, cast

from mell_frontend.stream import claims
from tests.cluster.protocol.state import FRONTEND, Claimed, Draft, Front, Ids

MOST_ABORTED = 8


class WrongTextError(AssertionError):
    """A token was accepted that was not computed on what had been accepted."""


def claim(draft: Draft, claimed: Claimed) -> None:
    """Answer a claim."""
    reply = _rule(draft, claimed)
    if reply is None:
        draft.send("refused", FRONTEND, claimed.target, claimed.migration)
    else:
        draft.send("granted", FRONTEND, claimed.target, claimed.migration, reply)


def _rule(draft: Draft, claimed: Claimed) -> tuple[int, int] | None:
    front = draft.front
    if front.ended:
        return None
    record = cast("Any", front)
    repeated = claims.repeated_grant(record, cast("Any", claimed))
    if repeated is not None:
        return cast("tuple[int, int]", repeated)
    why = claims.claim_refusal(record, cast("Any", claimed), MOST_ABORTED)
    if why is not None:
        assert not (draft.smooth and why == "length"), "a move fails for no other reason than that its source went on"
        return None
    taken = raise_generation(front)
    reply = (taken.generation, taken.accepted)
    draft.front = taken._replace(owner=claimed.target, granted=(claimed, reply))
    return reply


def raise_generation(front: Front) -> Front:
    """Take the sequence from its owner."""
    return front._replace(owner=None, generation=front.generation + 1, granted=None, aborted=frozenset())


class _Abort:
    __slots__ = ("generation", "source")

    def __init__(self, generation: int, source: int) -> None:
        self.generation = generation
        self.source = source


def abort(draft: Draft, migration: int, generation: int, source: int) -> None:
    """A source asks that a claim never be granted."""
    front = draft.front
    owned = not front.ended and claims.still_owns(cast("Any", front), cast("Any", _Abort(generation, source)))
    if owned:
        draft.front = front._replace(aborted=front.aborted | {migration})
    draft.send("aborted", FRONTEND, source, migration, owned)


def tokens(draft: Draft, worker: int, generation: int, base: int, ids: Ids) -> bool:
    """Take a worker's tokens; returns whether any was accepted."""
    front = draft.front
    if front.ended or not from_owner(front, worker, generation):
        return False
    known = front.accepted
    if base > known or len(ids) <= known:
        return False
    if ids[:known] != front.output_ids or "hole" in ids:
        raise WrongTextError(f"{ids} is accepted after {front.output_ids}")
    draft.front = front._replace(output_ids=ids)
    if len(ids) >= draft.left.tokens:
        draft.front = end(draft.front)
    return True


def from_owner(front: Front, worker: int, generation: int) -> bool:
    """Whether tokens of this worker and generation may be taken."""
    return worker == front.owner and generation == front.generation


def end(front: Front) -> Front:
    """Return the record of a request that is over."""
    return front._replace(owner=None, ended=True, granted=None, aborted=frozenset())


def submit_again(draft: Draft, worker: int) -> None:
    """Take the sequence from its owner, who is told to stop, and give it to a worker."""
    front = draft.front
    if front.owner is not None:
        draft.send("drop", FRONTEND, front.owner, front.generation)
    taken = raise_generation(front)
    draft.front = taken._replace(owner=worker)
    draft.send("submit", FRONTEND, worker, taken.generation, submitted_ids(taken))


def submitted_ids(front: Front) -> Ids:
    """What a new owner is told."""
    return front.output_ids


def leave(draft: Draft) -> None:
    """The client goes."""
    front = draft.front
    if front.owner is not None:
        draft.send("drop", FRONTEND, front.owner, front.generation)
    draft.front = end(front)
