"""Calls of functions in a model's text, in the Hermes/Qwen form `<tool_call>{json}</tool_call>`; pure.

A call is handed on when it is complete and right: a client never sees half a call, or one that is no JSON.
"""

import json
from dataclasses import dataclass
from typing import Any

BEGIN = "<tool_call>"
END = "</tool_call>"
_SPACE = " \t\r\n"


@dataclass(frozen=True, slots=True)
class ParsedCall:
    """One call: the function's name and its arguments as JSON text."""

    name: str
    arguments: str


class ToolParser:
    """Splits one growing text into content and calls, the same ones however the text is cut into pieces.

    Space around calls is dropped; what stands in the marks but is no call stays content, marks included.
    """

    def __init__(self) -> None:
        self._held = ""
        self._mark: int | None = None
        self._after_call = False
        self.called = False

    def push(self, text: str) -> tuple[str, list[ParsedCall]]:
        """Return the content and the calls that are certain now."""
        self._held += text
        content: list[str] = []
        calls: list[ParsedCall] = []
        while self._begin_call(content) if self._mark is None else self._end_call(content, calls):
            pass
        return "".join(content), calls

    def flush(self) -> tuple[str, list[ParsedCall]]:
        """Return the rest at the end of the text; a call that only lacks its end mark counts."""
        held, self._held = self._held, ""
        call = None if self._mark is None else parse_call(held[self._mark + len(BEGIN) :])
        if call is None:
            return self._shown(held), []
        self.called = True
        return "", [call]

    def _begin_call(self, content: list[str]) -> bool:
        """Move up to the next begin mark, the space before it included; return whether there is one."""
        mark = self._held.find(BEGIN)
        safe = len(self._held[:mark].rstrip(_SPACE)) if mark >= 0 else len(self._held) - _open_chars(self._held)
        content.append(self._shown(self._held[:safe]))
        self._held = self._held[safe:]
        if mark >= 0:
            self._mark = mark - safe
        return mark >= 0

    def _end_call(self, content: list[str], calls: list[ParsedCall]) -> bool:
        """Move past the end mark; return whether it was there."""
        assert self._mark is not None
        begin = self._mark + len(BEGIN)
        end = self._held.find(END, begin)
        if end < 0:
            return False
        call = parse_call(self._held[begin:end])
        if call is None:
            content.append(self._shown(self._held[: end + len(END)]))
        else:
            calls.append(call)
            self.called = self._after_call = True
        self._held = self._held[end + len(END) :]
        self._mark = None
        return True

    def _shown(self, text: str) -> str:
        if self._after_call:
            text = text.lstrip(_SPACE)
            self._after_call = not text
        return text


def _open_chars(text: str) -> int:
    """Return how many characters at the end of `text` may be space before a mark, or the mark's beginning."""
    mark = next((n for n in range(min(len(BEGIN) - 1, len(text)), 0, -1) if text.endswith(BEGIN[:n])), 0)
    before = text[: len(text) - mark]
    return mark + len(before) - len(before.rstrip(_SPACE))


def parse_call(text: str) -> ParsedCall | None:
    """Return the call that `text` (what stands between the marks) means, or None."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        return None
    arguments = _arguments(value.get("arguments", value.get("parameters")))
    return None if arguments is None else ParsedCall(value["name"], arguments)


def _arguments(value: Any) -> str | None:
    """Return arguments as JSON text; models write an object, or that object's text, or nothing."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    if value is None:
        return "{}"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else None
