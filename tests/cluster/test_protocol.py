"""Within its bounds the migration protocol has no wrong state; without any one of its guards it has.

What only saves work is no guard: a worker refuses a late submission, say, but to run it would do no harm.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import pytest

from mell_frontend.stream import claims
from mell_gpu_worker.core.migration import tables
from mell_gpu_worker.core.migration.tables import Act, SourceEvent, SourcePhase, TargetEvent, TargetPhase, Way
from tests.cluster.protocol import frontend, source, target, ways
from tests.cluster.protocol.search import GUARDED, SMALL, Bounds, BrokenError, Search
from tests.cluster.protocol.state import Left

Patch = pytest.MonkeyPatch
S, SE, T, TE = SourcePhase, SourceEvent, TargetPhase, TargetEvent


@pytest.mark.parametrize("bounds", SMALL, ids=str)
def test_nothing_wrong_is_within_reach(bounds: Bounds) -> None:
    """No two owners, no wrong token, nothing held for ever, an end always in reach, no cycle; prints what was seen."""
    found = Search(bounds).run()
    print(f"{found.states} states, {found.steps} steps within {bounds}")  # noqa: T201 - the figure is asked for
    assert found.states > 100


# --- the arbiter's guards


def without_claim_rule(patch: Patch, rule: str) -> None:
    """Take one reason to refuse a claim away."""
    refusal = claims.claim_refusal

    def careless(*asked: Any) -> str | None:
        why = refusal(*asked)
        return None if why == rule else why

    patch.setattr(claims, "claim_refusal", careless)


def claim_of_any_generation(patch: Patch) -> None:
    """A claim names the generation that it continues."""
    without_claim_rule(patch, "generation")


def claim_from_anybody(patch: Patch) -> None:
    """A claim names the owner as its source."""
    patch.setattr(claims, "claim_refusal", lambda front, claim, most: _refusal_without_owner(front, claim))


def _refusal_without_owner(front: Any, claim: Any) -> str | None:
    if claim.migration in front.aborted:
        return "aborted"
    return "length" if claim.length < front.accepted else None


def claim_after_abort(patch: Patch) -> None:
    """A claim whose source was told that it still owns the sequence is never granted."""
    without_claim_rule(patch, "aborted")


def claim_of_too_little(patch: Patch) -> None:
    """A claim holds at least what was delivered."""
    without_claim_rule(patch, "length")


def claim_granted_once(patch: Patch) -> None:
    """The claim last granted, repeated, gets the same reply."""
    patch.setattr(claims, "repeated_grant", lambda *_: None)


def grant_without_generation(patch: Patch) -> None:
    """Whoever takes a sequence from its owner raises the generation."""
    patch.setattr(frontend, "raise_generation", lambda front: front._replace(owner=None, granted=None))


def claim_after_the_end(patch: Patch) -> None:
    """Nothing is granted once the request is over."""
    rule = frontend._rule

    def careless(draft: Any, claimed: Any) -> Any:
        if not draft.front.ended:
            return rule(draft, claimed)
        draft.front = draft.front._replace(owner=claimed.target)
        return (claimed.generation + 1, 0)

    patch.setattr(frontend, "_rule", careless)


def tokens_from_anybody(patch: Patch) -> None:
    """Tokens are taken from the owner, in its generation, only."""
    patch.setattr(frontend, "from_owner", lambda *_: True)


def tokens_of_any_generation(patch: Patch) -> None:
    """Tokens of an older generation are not taken, from the present owner neither."""
    patch.setattr(frontend, "from_owner", lambda front, worker, _: worker == front.owner)


def submission_without_output(patch: Patch) -> None:
    """A new owner is told what was delivered."""
    patch.setattr(frontend, "submitted_ids", lambda front: front.output_ids[:-1])


# --- the source's guards


def changed(patch: Patch, table: Mapping[Any, Any], phase: Any, event: Any, way: Way[Any]) -> None:
    """Change one row of a table."""
    patch.setitem(table[phase], event, way)


def decoding_while_handing_over(patch: Patch) -> None:
    """The source stands still before it names the last of its ids."""
    changed(patch, tables.SOURCE, S.COPYING, SE.TAIL_SMALL, Way(S.SENDING))


def not_waiting_for_the_step(patch: Patch) -> None:
    """The step under way is waited for."""
    notice = source.notice

    def careless(draft: Any, migration: int) -> None:
        notice(draft, migration)
        out = draft.outs[migration]
        if out is not None and out.standing.phase is S.STOPPING:
            source.apply(draft, migration, SE.STOPPED)

    patch.setattr(source, "notice", careless)


def freed_when_refused(patch: Patch) -> None:
    """A refused source asks its frontend before it frees anything."""
    changed(patch, tables.SOURCE, S.COMMITTING, SE.REFUSED, Way(S.OVER, (Act.FREE,)))


def freed_when_unanswered(patch: Patch) -> None:
    """An unanswered source asks its frontend before it frees anything."""
    changed(patch, tables.SOURCE, S.COMMITTING, SE.UNANSWERED, Way(S.OVER, (Act.FREE,)))


def freed_when_owned(patch: Patch) -> None:
    """A source that still owns the sequence goes on with it."""
    changed(patch, tables.SOURCE, S.ASKING, SE.OWNED, Way(S.OVER, (Act.FREE, Act.CLOSE)))


def never_resumed(patch: Patch) -> None:
    """A source that rolls a move back lets the sequence go on."""
    changed(patch, tables.SOURCE, S.ASKING, SE.OWNED, Way(S.OVER, (Act.CLOSE, Act.RELEASE)))


def asked_once(patch: Patch) -> None:
    """A frontend that does not answer is asked again, or the sequence goes on all the same."""
    changed(patch, tables.SOURCE, S.ASKING, SE.UNANSWERED, Way(S.OVER, (Act.CLOSE,)))


# --- the target's guards


def computing_with_a_hole(patch: Patch) -> None:
    """The target waits for all blocks that the source named."""
    patch.setattr(target, "in_place", lambda _: True)


def published_before_granted(patch: Patch) -> None:
    """The target publishes nothing before it is granted."""
    start = target._start

    def careless(draft: Any, migration: int) -> None:
        start(draft, migration)
        move = draft.ins[migration]
        run = target.Run(move.generation, move.ids, 0)
        draft.workers[move.worker] = draft.workers[move.worker]._replace(run=run, newest=move.generation)

    patch.setattr(target, "_start", careless)


def freed_while_claiming(patch: Patch) -> None:
    """A claim that may be granted keeps what it claims, whatever the source says."""
    changed(patch, tables.TARGET, T.CLAIMING, TE.RELEASED, Way(T.OVER, (Act.FREE, Act.REFUSE)))


def claimed_once(patch: Patch) -> None:
    """A claim without an answer is repeated."""
    changed(patch, tables.TARGET, T.CLAIMING, TE.UNANSWERED, Way(T.OVER, (Act.FREE, Act.REFUSE)))


def pause_ended_by_a_release(patch: Patch) -> None:
    """A release that comes between two claims does not keep the second from being made."""
    transition = tables.transition

    def careless(role: Any, state: Any, event: Any, now_us: int, limits: Any) -> Any:
        after, acts = transition(role, state, event, now_us, limits)
        return (replace(after, again_us=None) if event is TE.RELEASED else after), acts

    patch.setattr(tables, "transition", careless)


def held_for_ever(patch: Patch) -> None:
    """Room whose source is gone is freed after a while."""
    role = replace(tables.TARGET_ROLE, patience={T.CLAIMING: "claim_deadline_us"})
    patch.setattr(tables, "TARGET_ROLE", role)


# --- the worker's guards


def nothing_stopped_by_status(patch: Patch) -> None:
    """What nobody waits for is stopped when its status shows it."""
    patch.setattr(ways, "_statuses", lambda *_: iter(()))


@pytest.mark.parametrize(
    "guard",
    [
        claim_of_any_generation,
        claim_from_anybody,
        claim_after_abort,
        claim_of_too_little,
        claim_granted_once,
        grant_without_generation,
        claim_after_the_end,
        tokens_from_anybody,
        tokens_of_any_generation,
        submission_without_output,
        decoding_while_handing_over,
        not_waiting_for_the_step,
        freed_when_refused,
        freed_when_unanswered,
        freed_when_owned,
        never_resumed,
        asked_once,
        computing_with_a_hole,
        published_before_granted,
        freed_while_claiming,
        claimed_once,
        pause_ended_by_a_release,
        held_for_ever,
        nothing_stopped_by_status,
    ],
    ids=lambda guard: guard.__name__,
)
def test_each_guard_is_needed(guard: Callable[[Patch], None], monkeypatch: Patch) -> None:
    """Without it the search comes upon something wrong."""
    guard(monkeypatch)
    with pytest.raises(BrokenError):
        _search_all(GUARDED)


def _search_all(bounds: Iterable[Bounds]) -> None:
    for each in bounds:
        Search(each).run()


def test_what_is_wrong_is_told_with_the_steps_that_lead_there(monkeypatch: Patch) -> None:
    """The story begins at the start and ends with the last step."""
    grant_without_generation(monkeypatch)
    with pytest.raises(BrokenError, match=r"two workers own one generation(.|\n)*start\n(.|\n)*claim"):
        Search(Bounds(2, Left(tokens=2, moves=1, suspicions=0, cancels=0, faults=0))).run()
