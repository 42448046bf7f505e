import json
from itertools import pairwise

from hypothesis import example, given
from hypothesis import strategies as st

from mell_frontend.tools import ParsedCall, ToolParser, parse_call


def parsed(pieces: list[str]) -> tuple[str, list[ParsedCall], bool]:
    """Push all pieces, flush, and return content, calls, and whether any was called."""
    parser = ToolParser()
    content, calls = "", []
    for text, found in [*(parser.push(piece) for piece in pieces), parser.flush()]:
        content += text
        calls += found
    return content, calls, parser.called


def call_text(name: str, arguments: object) -> str:
    """Return a call as models write it."""
    return "<tool_call>\n" + json.dumps({"name": name, "arguments": arguments}) + "\n</tool_call>"


def cut(text: str, places: list[int]) -> list[str]:
    """Cut `text` at `places`."""
    borders = sorted({min(place, len(text)) for place in places} | {0, len(text)})
    return [text[a:b] for a, b in pairwise(borders)]


PARTS = st.sampled_from(
    [
        "Hello ",
        "\n",
        " <",
        "<tool_",
        "<tool_call>",
        "</tool_call>",
        call_text("f", {"a": 1}),
        call_text("g", {}),
        "<tool_call>broken</tool_call>",
        "x  ",
        "<tool_call>[1]</tool_call>",
    ]
)


@given(parts=st.lists(PARTS, max_size=8), places=st.lists(st.integers(0, 300), max_size=30))
@example(parts=["a ", "<tool_call>broken</tool_call>"], places=[2, 3, 10])
def test_any_cut_gives_the_same(parts: list[str], places: list[int]) -> None:
    """However a text is cut, it gives the same content and the same calls."""
    text = "".join(parts)
    assert parsed(cut(text, places)) == parsed([text]) == parsed(list(text))


@given(parts=st.lists(PARTS.filter(lambda part: '"name"' not in part), max_size=8))
def test_without_calls_nothing_is_lost(parts: list[str]) -> None:
    """A text without a right call is content as it is, space and marks included."""
    text = "".join(parts)
    assert parsed([text]) == (text, [], False)


@given(
    calls=st.lists(
        st.tuples(
            st.text("abc_", min_size=1), st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=9))
        )
    )
)
def test_all_calls_come_out_in_order(calls: list[tuple[str, dict[str, object]]]) -> None:
    """Every call that was written is found, with its arguments, in order."""
    text = "Let me see.\n" + "\n".join(call_text(name, arguments) for name, arguments in calls)
    content, found, called = parsed([text])
    assert [(call.name, json.loads(call.arguments)) for call in found] == calls
    assert content == ("Let me see." if calls else text)
    assert called == bool(calls)


def test_content_is_shown_before_the_mark_is_complete() -> None:
    """Only what may begin a call is held back."""
    parser = ToolParser()
    assert parser.push("Hello <b> <tool") == ("Hello <b>", [])
    assert parser.push("s>") == (" <tools>", [])


def test_an_unfinished_call_counts_if_it_is_whole() -> None:
    """A call cut off before its end mark is a call if its JSON is complete, else content."""
    assert parsed(['<tool_call>{"name": "f"}']) == ("", [ParsedCall("f", "{}")], True)
    assert parsed(['ok <tool_call>{"name": "f"']) == ('ok <tool_call>{"name": "f"', [], False)


def test_space_around_calls_is_dropped() -> None:
    """The line breaks that models put around calls are no content."""
    call = call_text("f", {})
    assert parsed([f"  {call}\n\n{call}\n"])[0] == ""
    assert parsed([f"{call}\n and then "])[0] == "and then "


def test_arguments_take_the_forms_that_models_write() -> None:
    """Arguments may be an object, an object's text, absent, or called parameters; nothing else is a call."""
    assert parse_call('{"name": "f", "arguments": {"a": "é"}}') == ParsedCall("f", '{"a": "é"}')
    assert parse_call('{"name": "f", "arguments": "{\\"a\\": 1}"}') == ParsedCall("f", '{"a": 1}')
    assert parse_call('{"name": "f", "parameters": {"a": 1}}') == ParsedCall("f", '{"a": 1}')
    assert parse_call('{"name": "f", "arguments": null}') == ParsedCall("f", "{}")
    for wrong in ('{"name": "f", "arguments": [1]}', '{"name": "f", "arguments": "x"}', '{"name": ""}', "[]", "{", "1"):
        assert parse_call(wrong) is None
    assert parse_call("[" * 100_000) is None
