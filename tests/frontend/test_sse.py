import json

from hypothesis import given
from hypothesis import strategies as st

from mell_frontend.sse import DONE, ChatChunks, CompletionChunks, comment, error_event
from mell_frontend.tools import ParsedCall

TEXTS = st.text(st.characters(codec="utf-8"), max_size=60)


def data(event: str) -> dict[str, object]:
    """Return the one event's JSON, read as the strictest and the laxest client would."""
    assert event.endswith("\n\n")
    assert event.isascii()
    assert event.count("\n") == 2
    lines = event.splitlines()
    assert lines[1:] == [""]
    assert lines[0].startswith("data: ")
    value: dict[str, object] = json.loads(lines[0].removeprefix("data: "))
    return value


@given(text=TEXTS, model=TEXTS, index=st.integers(0, 200), usage=st.booleans())
def test_text_chunks_read_back(text: str, model: str, index: int, usage: bool) -> None:
    """Any text and any model name come back from a chunk, one line each, in both forms."""
    chat = ChatChunks("chatcmpl-1", 7, model, include_usage=usage)
    choice = {"index": index, "delta": {"content": text}, "logprobs": None, "finish_reason": None}
    expected = {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 7,
        "model": model,
        "choices": [choice],
    }
    assert data(chat.text(index, text)) == expected | ({"usage": None} if usage else {})
    legacy = CompletionChunks("cmpl-1", 7, model)
    choice = {"index": index, "text": text, "logprobs": None, "finish_reason": None}
    assert data(legacy.text(index, text))["choices"] == [choice]


@given(name=TEXTS, arguments=TEXTS)
def test_call_chunks_read_back(name: str, arguments: str) -> None:
    """A call's chunk holds its position, id, name and arguments."""
    [choice] = data(ChatChunks("x", 1, "m").call(2, 3, "call_9", ParsedCall(name, arguments)))["choices"]  # type: ignore[misc]
    function = {"name": name, "arguments": arguments}
    call = {"index": 3, "id": "call_9", "type": "function", "function": function}
    assert choice == {"index": 2, "delta": {"tool_calls": [call]}, "logprobs": None, "finish_reason": None}


def test_the_first_and_last_chunks_of_a_choice() -> None:
    """A choice begins with its role and ends with its reason."""
    chunks = ChatChunks("x", 1, "m")
    assert data(chunks.role(1))["choices"] == [
        {"index": 1, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    ]
    assert data(chunks.finish(1, "length"))["choices"] == [
        {"index": 1, "delta": {}, "logprobs": None, "finish_reason": "length"}
    ]
    assert data(CompletionChunks("x", 1, "m").finish(0, "stop"))["choices"] == [
        {"index": 0, "text": "", "logprobs": None, "finish_reason": "stop"}
    ]


def test_usage_comes_with_no_choices() -> None:
    """The usage chunk has an empty list of choices."""
    value = data(ChatChunks("x", 1, "m", include_usage=True).usage({"prompt_tokens": 3}))
    assert (value["choices"], value["usage"]) == ([], {"prompt_tokens": 3})


def test_logprobs_travel_with_their_text() -> None:
    """Log-probabilities are in the chunk that has their tokens."""
    entry = {"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}
    [choice] = data(ChatChunks("x", 1, "m").text(0, "a", [entry]))["choices"]  # type: ignore[misc]
    assert choice["logprobs"] == {"content": [entry], "refusal": None}
    columns = {"tokens": ["a"], "token_logprobs": [-0.5], "top_logprobs": [{}], "text_offset": [0]}
    [choice] = data(CompletionChunks("x", 1, "m").text(0, "a", columns))["choices"]  # type: ignore[misc]
    assert choice["logprobs"] == columns


def test_other_events() -> None:
    """Comments, errors and the end have their exact forms."""
    assert comment("queued 3") == ": queued 3\n\n"
    assert data(error_event({"error": {"message": "é"}})) == {"error": {"message": "é"}}
    assert DONE == "data: [DONE]\n\n"
