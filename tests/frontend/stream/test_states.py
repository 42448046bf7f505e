from importlib.resources import files
from pathlib import Path

import pytest

from mell_frontend.stream.states import OWNED, TRANSITIONS, Cause, State, diagram, next_state

README = Path(str(files("mell_frontend"))).parent / "README.md"


def test_the_readmes_diagram_is_the_table() -> None:
    """Whoever changes the table changes the picture."""
    assert f"```mermaid\n{diagram()}\n```" in README.read_text()


def test_every_cause_and_state_is_used() -> None:
    """A state that cannot be reached, or a cause that never happens, would be a relic."""
    assert {cause for ways in TRANSITIONS.values() for cause in ways} == set(Cause)
    assert {end for ways in TRANSITIONS.values() for end in ways.values()} == set(State)
    assert TRANSITIONS.keys() == set(State)


def test_an_ended_sequence_stays_ended() -> None:
    """No way leads out."""
    assert TRANSITIONS[State.ENDED] == {}


def test_every_sequence_that_is_open_can_be_closed() -> None:
    """A reader may leave at any time."""
    assert all(ways[Cause.CLOSED] is State.ENDED for state, ways in TRANSITIONS.items() if state is not State.ENDED)


def test_only_sequences_with_an_owner_can_be_lost_evicted_or_claimed() -> None:
    """And only those can finish."""
    for cause in (Cause.OWNER_LOST, Cause.SUBMIT_LOST, Cause.EVICTED, Cause.CLAIM_GRANTED, Cause.FINISHED):
        assert {state for state, ways in TRANSITIONS.items() if cause in ways} <= OWNED


def test_an_illegal_change_names_state_and_cause() -> None:
    """It is a bug of ours: messages are judged before they may change a state."""
    with pytest.raises(AssertionError, match="that is ended cannot be evicted; it could be nothing"):
        next_state(State.ENDED, Cause.EVICTED)
    with pytest.raises(AssertionError, match="that is backing off cannot be placed; it could be pause over, closed"):
        next_state(State.BACKING_OFF, Cause.PLACED)
