"""Server-sent events of streamed completions, written by hand: what does not change is made once; pure.

All events are ASCII (other characters are escaped in the JSON), because some clients split lines at characters
such as U+2028 that JSON leaves as they are.
"""

import json
from json.encoder import encode_basestring_ascii as _quoted
from typing import Any

from mell_frontend.tools import ParsedCall

DONE = "data: [DONE]\n\n"
"""The last event of a stream."""


def comment(text: str) -> str:
    """Return a line that clients ignore; it shows that the connection lives. `text` is one line."""
    return f": {text}\n\n"


def error_event(body: dict[str, Any]) -> str:
    """Return the event for a problem in mid-stream; `[DONE]` does not follow it."""
    return f"data: {json.dumps(body)}\n\n"


class ChunkEncoder:
    """The chunks of one stream; every method returns one event.

    `kind` is the `object` of a chunk. With `include_usage` each chunk but the last says `"usage": null`.
    """

    def __init__(self, stream_id: str, kind: str, created: int, model: str, *, include_usage: bool = False) -> None:
        self._head = (
            f'data: {{"id":{_quoted(stream_id)},"object":"{kind}","created":{created},'
            f'"model":{_quoted(model)},"choices":['
        )
        self._tail = '],"usage":null}\n\n' if include_usage else "]}\n\n"

    def usage(self, usage: dict[str, Any]) -> str:
        """Return the last chunk before `[DONE]`, if it was asked for."""
        return f'{self._head}],"usage":{json.dumps(usage)}}}\n\n'


class ChatChunks(ChunkEncoder):
    """The chunks of a chat completion."""

    def __init__(self, stream_id: str, created: int, model: str, *, include_usage: bool = False) -> None:
        super().__init__(stream_id, "chat.completion.chunk", created, model, include_usage=include_usage)
        self._text_tail = f',"finish_reason":null}}{self._tail}'

    def role(self, index: int) -> str:
        """Return a choice's first chunk."""
        return self._chunk(index, '{"role":"assistant","content":""}')

    def text(self, index: int, text: str, logprobs: list[dict[str, Any]] | None = None) -> str:
        """Return a chunk with text, perhaps none, and the log-probabilities of new tokens."""
        scores = "null" if logprobs is None else json.dumps({"content": logprobs, "refusal": None})
        return (
            f'{self._head}{{"index":{index},"delta":{{"content":{_quoted(text)}}},"logprobs":{scores}{self._text_tail}'
        )

    def call(self, index: int, position: int, call_id: str, call: ParsedCall) -> str:
        """Return a chunk with one whole call, the choice's `position`-th."""
        function = {"name": call.name, "arguments": call.arguments}
        entry = {"index": position, "id": call_id, "type": "function", "function": function}
        return self._chunk(index, json.dumps({"tool_calls": [entry]}))

    def finish(self, index: int, reason: str) -> str:
        """Return a choice's last chunk."""
        return self._chunk(index, "{}", f'"{reason}"')

    def _chunk(self, index: int, delta: str, finish: str = "null") -> str:
        return f'{self._head}{{"index":{index},"delta":{delta},"logprobs":null,"finish_reason":{finish}}}{self._tail}'


class CompletionChunks(ChunkEncoder):
    """The chunks of a legacy completion."""

    def __init__(self, stream_id: str, created: int, model: str, *, include_usage: bool = False) -> None:
        super().__init__(stream_id, "text_completion", created, model, include_usage=include_usage)

    def text(self, index: int, text: str, logprobs: dict[str, list[Any]] | None = None) -> str:
        """Return a chunk with text, perhaps none, and the log-probabilities of new tokens."""
        return self._chunk(index, text, "null" if logprobs is None else json.dumps(logprobs))

    def finish(self, index: int, reason: str) -> str:
        """Return a choice's last chunk."""
        return self._chunk(index, "", "null", f'"{reason}"')

    def _chunk(self, index: int, text: str, logprobs: str, finish: str = "null") -> str:
        return (
            f'{self._head}{{"index":{index},"text":{_quoted(text)},"logprobs":{logprobs},'
            f'"finish_reason":{finish}}}{self._tail}'
        )
