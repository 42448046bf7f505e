from hypothesis import given
from hypothesis import strategies as st

from mell_frontend.choice import ChoiceText, Piece
from mell_frontend.generation import Delta
from mell_frontend.stop import StopMatcher
from mell_frontend.tokenizer import ByteTokenizer
from mell_frontend.tools import ParsedCall, ToolParser
from mell_shared.messages.frontend import TokenLogprobs


def choice(*, stops: tuple[str, ...] = (), tools: bool = False, min_tokens: int = 0) -> ChoiceText:
    """Return a choice of the `fake` model."""
    stop = StopMatcher(stops) if stops else None
    return ChoiceText(ByteTokenizer().detokenizer([]), stop, ToolParser() if tools else None, min_tokens)


def run(made: ChoiceText, deltas: list[Delta]) -> tuple[str, list[Piece]]:
    """Push deltas until the choice ends; return its text and the pieces."""
    pieces: list[Piece] = []
    for delta in deltas:
        pieces.append(made.push(delta))
        if pieces[-1].finish is not None:
            break
    return "".join(piece.text for piece in pieces), pieces


def in_deltas(text: str, sizes: list[int]) -> list[Delta]:
    """Return deltas of the given sizes (the last takes the rest) that say `text` and end it."""
    ids = list(text.encode())
    deltas = []
    for size in sizes:
        deltas.append(Delta(ids[:size]))
        ids = ids[size:]
    return [*deltas, Delta([*ids, 257], finish_reason="stop")]


@given(
    text=st.text("ab<é", max_size=30),
    sizes=st.lists(st.integers(0, 5), max_size=10),
    min_tokens=st.integers(0, 10),
    tools=st.booleans(),
)
def test_the_result_does_not_depend_on_the_deltas(text: str, sizes: list[int], min_tokens: int, tools: bool) -> None:
    """Text, token count and reason are the same however the tokens were bundled."""
    split = choice(stops=("ab", "<é"), tools=tools, min_tokens=min_tokens)
    whole = choice(stops=("ab", "<é"), tools=tools, min_tokens=min_tokens)
    text_split, pieces_split = run(split, in_deltas(text, sizes))
    text_whole, pieces_whole = run(whole, in_deltas(text, []))
    assert text_split == text_whole
    assert split.tokens == whole.tokens
    assert pieces_split[-1].finish == pieces_whole[-1].finish == "stop"
    assert [token for piece in pieces_split for token in piece.token_ids] == pieces_whole[-1].token_ids


def test_tokens_after_a_stop_string_do_not_count() -> None:
    """Tokens that came in one delta after the stop string are neither shown nor counted."""
    made = choice(stops=("lo",))
    piece = made.push(Delta(list(b"hello world"), [TokenLogprobs(logprob=-1.0)] * 11))
    assert (piece.text, piece.finish, made.tokens) == ("hel", "stop", 5)
    assert piece.token_ids == list(b"hello")
    assert len(piece.logprobs) == 5


def test_the_first_tokens_are_not_searched_for_stops() -> None:
    """With `min_tokens` a stop string made of the first tokens does not end the text."""
    assert run(choice(stops=("a",), min_tokens=3), in_deltas("aaaba", []))[0] == "aaab"


def test_held_text_is_shown_at_the_end() -> None:
    """What might have become a stop string is shown when the tokens end before it does."""
    text, pieces = run(choice(stops=("abc",)), [Delta(list(b"xab")), Delta([], finish_reason="length")])
    assert [piece.text for piece in pieces] == ["x", "ab"]
    assert (text, pieces[-1].finish) == ("xab", "length")


def test_a_stop_string_at_the_very_end_wins() -> None:
    """A replacement mark that the end of the tokens brings can complete a stop string."""
    text, pieces = run(choice(stops=("\ufffd",)), [Delta([0x41, 0xE4], finish_reason="length")])
    assert (text, pieces[-1].finish) == ("A", "stop")


def test_calls_make_the_reason() -> None:
    """A choice with a call ends with `tool_calls`, its content without the call's text."""
    made = choice(tools=True)
    text, pieces = run(made, in_deltas('Hi <tool_call>{"name": "f", "arguments": {}}</tool_call>', [5, 9]))
    assert text == "Hi"
    assert [call for piece in pieces for call in piece.calls] == [ParsedCall("f", "{}")]
    assert pieces[-1].finish == "tool_calls"


def test_cached_tokens_are_kept() -> None:
    """The number of cached prompt tokens is the one said with the first delta."""
    made = choice()
    made.push(Delta([65], cached_tokens=16))
    made.push(Delta([65]))
    assert made.cached_tokens == 16
