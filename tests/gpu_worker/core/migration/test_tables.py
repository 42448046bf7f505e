from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest

from mell_gpu_worker.core.migration.limits import MoveLimits
from mell_gpu_worker.core.migration.tables import (
    SOURCE,
    SOURCE_ROLE,
    TARGET,
    TARGET_ROLE,
    Act,
    SourceEvent,
    SourcePhase,
    Standing,
    TargetEvent,
    TargetPhase,
    begin,
    diagram,
    due,
    transition,
)

README = Path(__file__).parents[4] / "services" / "gpu_worker" / "README.md"
LIMITS = MoveLimits(move_us=100, ask_us=70, idle_us=50, claim_deadline_us=90, ask_pause_us=5)
S, SE, T, TE = SourcePhase, SourceEvent, TargetPhase, TargetEvent

SOURCE_ROWS = [
    (S.RESERVING, SE.RESERVED, S.COPYING, ()),
    (S.RESERVING, SE.REFUSED, S.OVER, (Act.FAIL,)),
    (S.RESERVING, SE.UNANSWERED, S.OVER, (Act.RELEASE, Act.FAIL)),
    (S.RESERVING, SE.LOST, S.OVER, (Act.RELEASE, Act.FAIL)),
    (S.COPYING, SE.TAIL_SMALL, S.STOPPING, (Act.STOP,)),
    (S.COPYING, SE.REFUSED, S.OVER, (Act.CLOSE, Act.RELEASE, Act.FAIL)),
    (S.COPYING, SE.UNANSWERED, S.OVER, (Act.CLOSE, Act.RELEASE, Act.FAIL)),
    (S.COPYING, SE.LINK_FAILED, S.OVER, (Act.CLOSE, Act.RELEASE, Act.FAIL)),
    (S.COPYING, SE.LOST, S.OVER, (Act.CLOSE, Act.RELEASE, Act.FAIL)),
    (S.COPYING, SE.LATE, S.OVER, (Act.CLOSE, Act.RELEASE, Act.FAIL)),
    (S.STOPPING, SE.STOPPED, S.SENDING, ()),
    (S.STOPPING, SE.LINK_FAILED, S.OVER, (Act.RESUME, Act.CLOSE, Act.RELEASE, Act.FAIL)),
    (S.STOPPING, SE.LOST, S.OVER, (Act.CLOSE, Act.RELEASE, Act.FAIL)),
    (S.SENDING, SE.ALL_SENT, S.COMMITTING, (Act.COMMIT,)),
    (S.SENDING, SE.LINK_FAILED, S.OVER, (Act.RESUME, Act.CLOSE, Act.RELEASE, Act.FAIL)),
    (S.SENDING, SE.LOST, S.OVER, (Act.CLOSE, Act.RELEASE, Act.FAIL)),
    (S.COMMITTING, SE.GRANTED, S.OVER, (Act.FREE, Act.CLOSE)),
    (S.COMMITTING, SE.REFUSED, S.ASKING, (Act.ABORT,)),
    (S.COMMITTING, SE.UNANSWERED, S.ASKING, (Act.ABORT,)),
    (S.COMMITTING, SE.LOST, S.OVER, (Act.CLOSE, Act.RELEASE)),
    (S.ASKING, SE.OWNED, S.OVER, (Act.RESUME, Act.CLOSE, Act.RELEASE, Act.FAIL)),
    (S.ASKING, SE.DISOWNED, S.OVER, (Act.FREE, Act.CLOSE)),
    (S.ASKING, SE.UNANSWERED, S.ASKING, (Act.PAUSE,)),
    (S.ASKING, SE.PAUSE_OVER, S.ASKING, (Act.ABORT,)),
    (S.ASKING, SE.LATE, S.RESUMED, (Act.RESUME,)),
    (S.ASKING, SE.LOST, S.OVER, (Act.CLOSE, Act.RELEASE)),
    (S.RESUMED, SE.OWNED, S.OVER, (Act.CLOSE, Act.RELEASE, Act.FAIL)),
    (S.RESUMED, SE.DISOWNED, S.OVER, (Act.FREE, Act.CLOSE)),
    (S.RESUMED, SE.UNANSWERED, S.RESUMED, (Act.PAUSE,)),
    (S.RESUMED, SE.PAUSE_OVER, S.RESUMED, (Act.ABORT,)),
    (S.RESUMED, SE.LOST, S.OVER, (Act.CLOSE, Act.RELEASE)),
]
DROP = (Act.FREE, Act.CLOSE, Act.REFUSE)
TARGET_ROWS = [
    (T.OFFERING, TE.OFFERED, T.RESERVED, (Act.TELL_RESERVED,)),
    (T.RESERVED, TE.HEARD, T.RESERVED, ()),
    (T.RESERVED, TE.COMMITTED, T.JOINING, ()),
    (T.JOINING, TE.HEARD, T.JOINING, ()),
    (T.JOINING, TE.READY, T.CLAIMING, (Act.START, Act.CLOSE, Act.CLAIM)),
    *(
        (phase, event, T.OVER, DROP)
        for phase in (T.OFFERING, T.RESERVED, T.JOINING)
        for event in (TE.RELEASED, TE.LINK_FAILED, TE.LOST, TE.LATE)
    ),
    (T.CLAIMING, TE.GRANTED, T.SETTLING, (Act.ADOPT, Act.TELL_GRANTED)),
    (T.CLAIMING, TE.REFUSED, T.OVER, (Act.FREE, Act.REFUSE)),
    (T.CLAIMING, TE.UNANSWERED, T.CLAIMING, (Act.PAUSE,)),
    (T.CLAIMING, TE.PAUSE_OVER, T.CLAIMING, (Act.CLAIM,)),
    (T.CLAIMING, TE.RELEASED, T.CLAIMING, ()),
    (T.CLAIMING, TE.LOST, T.OVER, (Act.FREE, Act.REFUSE)),
    (T.CLAIMING, TE.LATE, T.OVER, (Act.FREE, Act.REFUSE)),
    *((T.SETTLING, event, T.OVER, (Act.TELL_COMMITTED,)) for event in (TE.FIRST_OUTPUT, TE.LOST, TE.LATE)),
]


@pytest.mark.parametrize("row", SOURCE_ROWS, ids=lambda row: f"{row[0]}, {row[1]}")
def test_each_row_of_the_source(row: tuple[S, SE, S, tuple[Act, ...]]) -> None:
    """Phase and event give the next phase and what is to be done, in order."""
    phase, event, then, acts = row
    state, done = transition(SOURCE_ROLE, Standing(phase), event, 0, LIMITS)
    assert (state.phase, done) == (then, acts)


@pytest.mark.parametrize("row", TARGET_ROWS, ids=lambda row: f"{row[0]}, {row[1]}")
def test_each_row_of_the_target(row: tuple[T, TE, T, tuple[Act, ...]]) -> None:
    """Phase and event give the next phase and what is to be done, in order."""
    phase, event, then, acts = row
    state, done = transition(TARGET_ROLE, Standing(phase), event, 0, LIMITS)
    assert (state.phase, done) == (then, acts)


def test_there_are_no_other_rows() -> None:
    """What is not written above is illegal."""
    assert {(phase, event) for phase, ways in SOURCE.items() for event in ways} == {row[:2] for row in SOURCE_ROWS}
    assert {(phase, event) for phase, ways in TARGET.items() for event in ways} == {row[:2] for row in TARGET_ROWS}
    assert set(SOURCE) == set(S)
    assert set(TARGET) == set(T)


def test_an_illegal_event_is_told_with_role_phase_and_event() -> None:
    """The error says who, where, what, and what would have been legal."""
    with pytest.raises(AssertionError) as error:
        transition(SOURCE_ROLE, Standing(S.RESERVING), SE.GRANTED, 0, LIMITS)
    for word in ("source", "reserving", "granted", "refused"):
        assert word in str(error.value)
    with pytest.raises(AssertionError, match="nothing"):
        transition(TARGET_ROLE, Standing(T.OVER), TE.LATE, 0, LIMITS)


def test_every_wait_ends_by_itself_or_by_an_answer_that_is_owed() -> None:
    """Each phase has a deadline, or waits only for what ends in an event for sure: a request, a step, a transfer."""
    owed = {S.RESERVING, S.STOPPING, S.SENDING, S.COMMITTING, S.RESUMED}
    assert set(S) - {S.OVER} == owed | set(SOURCE_ROLE.patience)
    assert set(T) - {T.OVER} == set(TARGET_ROLE.patience)


def test_a_sequence_stands_still_only_where_something_ends_that() -> None:
    """Whoever stops the sequence also resumes or frees it, on every way out, unless it is gone already."""
    still = {S.STOPPING, S.SENDING, S.COMMITTING, S.ASKING}
    for phase, event, then, acts in SOURCE_ROWS:
        if phase in still and then not in still:
            assert event is SE.LOST or Act.RESUME in acts or Act.FREE in acts, (phase, event)


def test_nothing_is_published_or_freed_too_early() -> None:
    """Only a grant makes a target publish; a source frees only what it knows is not its own."""
    assert [row[:2] for row in TARGET_ROWS if Act.ADOPT in row[3]] == [(T.CLAIMING, TE.GRANTED)]
    assert {row[1] for row in SOURCE_ROWS if Act.FREE in row[3]} == {SE.GRANTED, SE.DISOWNED}
    assert [row[:2] for row in SOURCE_ROWS if Act.COMMIT in row[3]] == [(S.SENDING, SE.ALL_SENT)]


def test_deadlines_begin_with_their_phase_and_pauses_end() -> None:
    """A phase's time counts from its beginning; a pause makes its question due again; an answer ends both."""
    state = Standing(S.COMMITTING)
    state, _ = transition(SOURCE_ROLE, state, SE.UNANSWERED, 1000, LIMITS)
    assert state == Standing(S.ASKING, until_us=1070)
    state, _ = transition(SOURCE_ROLE, state, SE.UNANSWERED, 1010, LIMITS)
    assert state == Standing(S.ASKING, until_us=1070, again_us=1015)
    assert due(SOURCE_ROLE, state, 1014) is None
    assert due(SOURCE_ROLE, state, 1015) is SE.PAUSE_OVER
    state, _ = transition(SOURCE_ROLE, state, SE.PAUSE_OVER, 1015, LIMITS)
    assert state == Standing(S.ASKING, until_us=1070)
    state, _ = transition(SOURCE_ROLE, state, SE.UNANSWERED, 1068, LIMITS)
    assert due(SOURCE_ROLE, state, 1070) is SE.LATE
    state, _ = transition(SOURCE_ROLE, state, SE.LATE, 1070, LIMITS)
    assert state == Standing(S.RESUMED, again_us=1073), "it is asked on"


def test_a_release_during_the_pause_between_two_claims_does_not_end_it() -> None:
    """Else the claim, which may have been granted, would never be repeated, and the sequence stand still."""
    state = Standing(T.CLAIMING, until_us=1090)
    state, _ = transition(TARGET_ROLE, state, TE.UNANSWERED, 1000, LIMITS)
    state, acts = transition(TARGET_ROLE, state, TE.RELEASED, 1002, LIMITS)
    assert acts == ()
    assert due(TARGET_ROLE, state, 1005) is TE.PAUSE_OVER
    state, acts = transition(TARGET_ROLE, state, TE.PAUSE_OVER, 1005, LIMITS)
    assert acts == (Act.CLAIM,)
    assert due(TARGET_ROLE, state, 1006) is None


def test_a_target_that_hears_of_its_source_waits_anew() -> None:
    """A reservation ends when its source has not been heard of for a while, not when it takes long."""
    state = begin(TARGET_ROLE, 0, LIMITS)
    state, _ = transition(TARGET_ROLE, state, TE.OFFERED, 10, LIMITS)
    assert state == Standing(T.RESERVED, until_us=60)
    state, _ = transition(TARGET_ROLE, state, TE.HEARD, 40, LIMITS)
    assert state == Standing(T.RESERVED, until_us=90)
    assert due(TARGET_ROLE, state, 90) is TE.LATE


def reachable(role: str) -> Iterator[tuple[object, object]]:
    """Phases that follow each other, over any number of events."""
    table = SOURCE if role == "source" else TARGET
    edges = {(phase, way.phase) for phase, ways in table.items() for way in ways.values()}
    for middle, first, last in product(table, repeat=3):
        if (first, middle) in edges and (middle, last) in edges:
            edges.add((first, last))
    yield from edges


def test_from_every_phase_it_can_be_over() -> None:
    """No phase is a trap, and every phase is reached."""
    for role, table, first, over in (("source", SOURCE, S.RESERVING, S.OVER), ("target", TARGET, T.OFFERING, T.OVER)):
        ways = set(reachable(role))
        assert {phase for phase in table if (phase, over) in ways} == set(table) - {over}
        assert {phase for phase in table if (first, phase) in ways} >= set(table) - {first}


def test_states_are_values() -> None:
    """They can be compared, put into sets, and used as keys: whoever searches all of them needs that."""
    assert len({begin(SOURCE_ROLE, 0, LIMITS), begin(SOURCE_ROLE, 0, LIMITS), Standing(S.COPYING)}) == 2


def test_the_readmes_diagrams_are_the_tables() -> None:
    """Drawn from the tables by `diagram`; paste its output anew after a change."""
    text = README.read_text()
    for role in (SOURCE_ROLE, TARGET_ROLE):
        drawn = f"```mermaid\n{diagram(role)}\n```"  # type: ignore[misc, arg-type]
        assert drawn in text, f"the {role.name}'s diagram is another one:\n{drawn}"
