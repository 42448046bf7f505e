"""Reading server-sent events back in tests."""

import json
from typing import Any


def chunks(text: str) -> list[dict[str, Any]]:
    """Return the JSON of every data event; the stream must end with `[DONE]`."""
    data = [event.removeprefix("data: ") for event in text.split("\n\n") if event.startswith("data: ")]
    assert data[-1] == "[DONE]"
    return [json.loads(event) for event in data[:-1]]


def choices(text: str, index: int = 0) -> list[dict[str, Any]]:
    """Return a choice's part of every chunk that has one."""
    return [choice for chunk in chunks(text) for choice in chunk["choices"] if choice["index"] == index]


def content(text: str, index: int = 0) -> str:
    """Return the content of a choice of a streamed chat."""
    return "".join(choice["delta"].get("content") or "" for choice in choices(text, index))
