"""What a source does in the model: the real table's acts, carried out on a draft."""

from mell_gpu_worker.core.migration import tables
from mell_gpu_worker.core.migration.limits import MoveLimits
from mell_gpu_worker.core.migration.tables import Act, SourceEvent, SourcePhase
from tests.cluster.protocol.state import FRONTEND, Draft, Out

LIMITS = MoveLimits()


def order(draft: Draft, migration: int, source: int, target: int) -> None:
    """A scheduler orders a move, and it begins."""
    run = draft.workers[source].run
    assert run is not None
    standing = tables.begin(tables.SOURCE_ROLE, 0, LIMITS)
    draft.outs[migration] = Out(source, target, run.generation, standing, "reserve")
    draft.send("reserve", source, target, migration, run.generation, run.ids)


def apply(draft: Draft, migration: int, event: SourceEvent) -> None:
    """Let something happen to a move at its source."""
    out = draft.outs[migration]
    assert out is not None
    standing, acts = tables.transition(tables.SOURCE_ROLE, out.standing, event, 0, LIMITS)
    draft.outs[migration] = out._replace(standing=standing)
    for act in acts:
        _do(draft, migration, out, act)
    if standing.phase is SourcePhase.OVER:
        draft.outs[migration] = None


def _do(draft: Draft, migration: int, out: Out, act: Act) -> None:
    worker = draft.workers[out.worker]
    match act:
        case Act.STOP | Act.RESUME if worker.run is not None:
            run = worker.run._replace(halted=act is Act.STOP)
            draft.workers[out.worker] = worker._replace(run=run)
            if act is Act.STOP:
                _ask(draft, migration, "")
        case Act.FREE:
            draft.workers[out.worker] = worker._replace(run=None)
        case Act.COMMIT:
            assert worker.run is not None
            _ask(draft, migration, "commit")
            draft.send("round", out.worker, out.target, migration)
            draft.send("commit", out.worker, out.target, migration, worker.run.ids)
        case Act.ABORT:
            _ask(draft, migration, "ruling")
            draft.send("abort", out.worker, FRONTEND, migration, out.generation)
        case Act.RELEASE:
            draft.send("release", out.worker, out.target, migration)
        case Act.CLOSE:
            draft.net -= {m for m in draft.net if m[0] == "round" and m[3] == migration}
        case _:
            pass


def _ask(draft: Draft, migration: int, question: str) -> None:
    out = draft.outs[migration]
    assert out is not None
    draft.outs[migration] = out._replace(question=question)


def answered(draft: Draft, migration: int, question: str, event: SourceEvent) -> None:
    """An answer comes; one that nobody waits for any more changes nothing."""
    out = draft.outs[migration]
    if out is None or out.question != question:
        return
    draft.outs[migration] = out._replace(question="")
    apply(draft, migration, event)


def link_failed(draft: Draft, migration: int) -> None:
    """The transfer has broken off."""
    out = draft.outs[migration]
    linked = {SourcePhase.COPYING, SourcePhase.STOPPING, SourcePhase.SENDING}
    if out is not None and out.standing.phase in linked:
        apply(draft, migration, SourceEvent.LINK_FAILED)


def notice(draft: Draft, migration: int) -> None:
    """See what has become of the sequence that moves."""
    out = draft.outs[migration]
    if out is None:
        return
    run = draft.workers[out.worker].run
    if run is None or run.generation != out.generation or not run.live(draft.left.tokens):
        apply(draft, migration, SourceEvent.LOST)
    elif out.standing.phase is SourcePhase.STOPPING and not run.in_step:
        apply(draft, migration, SourceEvent.STOPPED)


def next_step(draft: Draft, migration: int) -> SourceEvent | None:
    """Return what the source itself does next, if anything."""
    out = draft.outs[migration]
    assert out is not None
    match out.standing.phase:
        case SourcePhase.COPYING:
            return SourceEvent.TAIL_SMALL
        case SourcePhase.SENDING:
            return SourceEvent.ALL_SENT
        case _:
            return None
