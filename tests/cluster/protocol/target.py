"""What a target does in the model: the real table's acts, carried out on a draft."""

from mell_gpu_worker.core.migration import tables
from mell_gpu_worker.core.migration.tables import Act, TargetEvent, TargetPhase
from tests.cluster.protocol.source import LIMITS
from tests.cluster.protocol.state import FRONTEND, Draft, Ids, In, Run

HELD = {TargetPhase.OFFERING, TargetPhase.RESERVED, TargetPhase.JOINING}


def reserve(draft: Draft, migration: int, source: int, worker: int, *, generation: int, ids: Ids) -> None:
    """A source asks for room."""
    move = draft.ins[migration]
    if move is not None:
        draft.send("reserved", worker, source, migration)
    elif draft.past[migration] or draft.workers[worker].newest >= generation or _coming(draft, worker):
        draft.past[migration] = draft.past[migration] or "refused"
        draft.send("kv refused", worker, source, migration)
    else:
        give_up(draft, worker)
        standing = tables.begin(tables.TARGET_ROLE, 0, LIMITS)
        draft.ins[migration] = In(worker, source, generation, standing, ids)
        apply(draft, migration, TargetEvent.OFFERED)


def _coming(draft: Draft, worker: int) -> bool:
    return any(move is not None and move.worker == worker for move in draft.ins)


def commit(draft: Draft, migration: int, source: int, worker: int, ids: Ids) -> None:
    """A source hands over."""
    move = draft.ins[migration]
    if move is not None and move.standing.phase in {TargetPhase.JOINING, TargetPhase.CLAIMING}:
        draft.ins[migration] = move._replace(waited_for=True)
    elif move is not None and move.standing.phase is TargetPhase.RESERVED:
        draft.ins[migration] = move._replace(waited_for=True, ids=ids)
        apply(draft, migration, TargetEvent.COMMITTED)
    else:
        granted = draft.past[migration] == "granted"
        draft.send("commit granted" if granted else "commit refused", worker, source, migration)


def release(draft: Draft, migration: int) -> None:
    """A source has called the move off."""
    if draft.ins[migration] is not None:
        apply(draft, migration, TargetEvent.RELEASED)
    else:
        draft.past[migration] = draft.past[migration] or "refused"


def arrived(draft: Draft, migration: int) -> None:
    """The last blocks are in place."""
    move = draft.ins[migration]
    if move is not None:
        draft.ins[migration] = move._replace(kv=True)
        if move.standing.phase in {TargetPhase.RESERVED, TargetPhase.JOINING}:
            apply(draft, migration, TargetEvent.HEARD)


def link_failed(draft: Draft, migration: int) -> None:
    """The transfer has broken off."""
    move = draft.ins[migration]
    if move is not None and move.standing.phase in HELD and not move.kv:
        apply(draft, migration, TargetEvent.LINK_FAILED)


def ruled(draft: Draft, migration: int, granted: tuple[int, int] | None) -> None:
    """The frontend has granted (generation, accepted) or refused a claim."""
    move = draft.ins[migration]
    if move is None or move.standing.phase is not TargetPhase.CLAIMING or not move.asking:
        return
    draft.ins[migration] = move._replace(asking=False)
    if granted is None:
        apply(draft, migration, TargetEvent.REFUSED)
    else:
        apply(draft, migration, TargetEvent.GRANTED, granted)


def apply(draft: Draft, migration: int, event: TargetEvent, granted: tuple[int, int] | None = None) -> None:
    """Let something happen to a move at its target."""
    move = draft.ins[migration]
    assert move is not None
    standing, acts = tables.transition(tables.TARGET_ROLE, move.standing, event, 0, LIMITS)
    draft.ins[migration] = move._replace(standing=standing)
    for act in acts:
        _do(draft, migration, move, act, granted)
    if standing.phase in {TargetPhase.OVER, TargetPhase.SETTLING}:  # what is left of settling only tells a scheduler
        draft.ins[migration] = None
        draft.past[migration] = draft.past[migration] or "refused"


def _do(draft: Draft, migration: int, move: In, act: Act, granted: tuple[int, int] | None) -> None:
    match act:
        case Act.TELL_RESERVED:
            draft.send("reserved", move.worker, move.source, migration)
        case Act.START:
            _start(draft, migration)
        case Act.CLAIM:
            _claim(draft, migration)
        case Act.ADOPT:
            assert granted is not None
            _adopt(draft, move, *granted)
        case Act.TELL_GRANTED:
            _settle(draft, migration, move, "granted")
        case Act.REFUSE:
            _settle(draft, migration, move, "refused")
        case _:
            pass


def _start(draft: Draft, migration: int) -> None:
    move = draft.ins[migration]
    assert move is not None
    # Computing on without the last blocks makes nonsense: it is marked as such.
    ids = move.ids if move.kv else (*move.ids[:-1], "hole") if move.ids else ("hole",)
    draft.ins[migration] = move._replace(ids=ids, length=len(move.ids))


def _claim(draft: Draft, migration: int) -> None:
    move = draft.ins[migration]
    assert move is not None
    draft.ins[migration] = move._replace(asking=True)
    draft.send("claim", move.worker, FRONTEND, migration, move.generation, move.source, move.length)


def _adopt(draft: Draft, move: In, generation: int, accepted: int) -> None:
    """The sequence is the target's; unless the frontend's next word about it has overtaken this one."""
    worker = draft.workers[move.worker]
    if worker.newest >= generation:
        return
    give_up(draft, move.worker)
    run = Run(generation, move.ids, accepted, in_step=move.in_step)
    draft.workers[move.worker] = worker._replace(run=run, newest=generation)


def _settle(draft: Draft, migration: int, move: In, how: str) -> None:
    draft.past[migration] = how
    if move.waited_for:
        draft.send(f"commit {how}", move.worker, move.source, migration)
    elif how == "refused" and move.standing.phase is TargetPhase.OFFERING:
        draft.send("kv refused", move.worker, move.source, migration)


def give_up(draft: Draft, worker: int) -> None:
    """Stop and forget what runs at a worker."""
    draft.workers[worker] = draft.workers[worker]._replace(run=None)


def notice(draft: Draft, migration: int) -> None:
    """See whether the sequence has gone on elsewhere meanwhile."""
    move = draft.ins[migration]
    if move is None or move.standing.phase is TargetPhase.CLAIMING:
        return
    if draft.workers[move.worker].newest > move.generation:
        apply(draft, migration, TargetEvent.LOST)


def proceed(draft: Draft, migration: int) -> None:
    """Claim, once everything that the source named is in place."""
    move = draft.ins[migration]
    if move is not None and move.standing.phase is TargetPhase.JOINING and in_place(move):
        apply(draft, migration, TargetEvent.READY)


def in_place(move: In) -> bool:
    """Whether everything that the source named is there."""
    return move.kv


def computes(move: In, tokens: int) -> bool:
    """Whether it may make a token of its own before it is granted."""
    return move.standing.phase is TargetPhase.CLAIMING and move.length <= len(move.ids) < min(move.length + 1, tokens)
