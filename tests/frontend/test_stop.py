from hypothesis import example, given
from hypothesis import strategies as st

from mell_frontend.stop import StopMatcher


def naive(text: str, stops: list[str]) -> str:
    """Return the text up to the stop string that is complete first, by trying every end."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


SMALL = st.text("abc", max_size=12)
STOPS = st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=4)


@given(pieces=st.lists(SMALL, max_size=8), stops=STOPS)
@example(pieces=["ab", "cd"], stops=["abcd", "c"])
@example(pieces=["aab"], stops=["aab", "ab", "b"])
def test_pieces_give_what_the_whole_text_gives(pieces: list[str], stops: list[str]) -> None:
    """However the text is cut, what is shown equals a naive search in all of it, and ends at the same stop."""
    matcher = StopMatcher(stops)
    shown, given_so_far = "", ""
    for piece in pieces:
        if matcher.stopped:
            break
        given_so_far += piece
        shown += matcher.push(piece)
        expected = naive(given_so_far, stops)
        assert expected.startswith(shown)
        assert matcher.stopped == (expected != given_so_far or any(stop in given_so_far for stop in stops))
    whole = shown if matcher.stopped else shown + matcher.flush()
    assert whole == naive(given_so_far, stops)


@given(text=SMALL, stops=STOPS)
def test_no_more_is_held_than_a_stop_string_may_need(text: str, stops: list[str]) -> None:
    """What is held back is the longest end of the text that begins a stop string, and nothing else."""
    matcher = StopMatcher(stops)
    shown = matcher.push(text)
    if matcher.stopped:
        return
    held = text[len(shown) :]
    ends = [text[n:] for n in range(len(text)) if any(stop.startswith(text[n:]) for stop in stops)]
    assert held == max(ends, key=len, default="")


def test_text_is_held_only_while_it_may_become_a_stop() -> None:
    """A beginning of a stop string waits; when it turns out to be none, it is shown."""
    matcher = StopMatcher(["</end>"])
    assert matcher.push("Hello</") == "Hello"
    assert matcher.push("b>") == "</b>"
    assert matcher.push("x</end>y") == "x"
    assert matcher.stopped
