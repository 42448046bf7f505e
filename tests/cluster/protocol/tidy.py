"""Forgets what can have no effect any more, so that states that will do the same are the same."""

from mell_gpu_worker.core.migration.tables import TargetPhase
from tests.cluster.protocol import frontend
from tests.cluster.protocol.state import Draft, Front, Message

_QUESTIONS = {
    "reserved": "reserve",
    "kv refused": "reserve",
    "commit granted": "commit",
    "commit refused": "commit",
    "aborted": "ruling",
}
_OVER = Front(None, 0, (), ended=True)


def tidy(draft: Draft) -> None:
    """Drop messages that change nothing wherever and whenever they arrive, and records that nobody reads."""
    if draft.front.ended:
        draft.front = _OVER
    draft.net = {message for message in draft.net if _matters(draft, message)}
    for migration, past in enumerate(draft.past):
        moving = draft.outs[migration] is not None or draft.ins[migration] is not None
        if past not in {"", "over"} and not moving and not _spoken_of(draft, migration):
            draft.past[migration] = "over"


def _spoken_of(draft: Draft, migration: int) -> bool:
    return any(len(m) > 3 and m[3] == migration and m[0] in _ABOUT_MOVES for m in draft.net)


_ABOUT_MOVES = {"reserve", "commit", "release", "round", "claim", "abort", "granted", "refused", *_QUESTIONS}


def _matters(draft: Draft, message: Message) -> bool:  # noqa: PLR0911 - one for each kind
    kind, _, receiver, *rest = message
    front = draft.front
    match kind:
        case "tokens":
            return not front.ended and frontend.from_owner(front, message[1], rest[0])
        case "drop":
            worker = draft.workers[receiver]
            return worker.newest < rest[0] or (worker.run is not None and worker.run.generation == rest[0])
        case "submit":
            return draft.workers[receiver].newest < rest[0]
        case "claim" | "abort":
            current = not front.ended and rest[1] >= front.generation
            return current or _waited_for(draft, kind, rest[0])
        case "granted" | "refused":
            return _waited_for(draft, "claim", rest[0])
        case "round":
            return draft.ins[rest[0]] is not None
        case "release":
            return draft.ins[rest[0]] is not None or not draft.past[rest[0]]
        case "reserve" | "commit":
            out = draft.outs[rest[0]]
            return not draft.past[rest[0]] or (out is not None and out.question == kind)
        case _:
            out = draft.outs[rest[0]]
            return out is not None and out.question == _QUESTIONS[kind]


def _waited_for(draft: Draft, kind: str, migration: int) -> bool:
    if kind == "abort":
        out = draft.outs[migration]
        return out is not None and out.question == "ruling"
    move = draft.ins[migration]
    return move is not None and move.asking and move.standing.phase is TargetPhase.CLAIMING
