"""Writes `asyncapi.json` from the events' models: `make docs`; a test holds the two together."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mell_shared.events.data import EVENT_DATA, EventData
from mell_shared.events.envelope import CONTENT_TYPE, CloudEvent
from mell_shared.subjects import Subjects, event_stream

DOCUMENT = Path(__file__).with_name("asyncapi.json")

_ABOUT = (
    "What a Mell cluster tells other systems: CloudEvents 1.0 in JSON, one a message, kept in the JetStream stream "
    f"`{event_stream('mell')}` for a time and a size that are settings. Each source counts its events from 1: a hole "
    "in `sequence` is a loss, and the source's next `*.state` event says how things stand. An event may come twice. "
    "No event holds a prompt or an output."
)


def document() -> dict[str, Any]:
    """Return the AsyncAPI 3 document."""
    schemas: dict[str, Any] = {}
    for data in EVENT_DATA:
        schema = data.model_json_schema(mode="serialization", ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {})
        schemas[data.__name__] = schema
    return {
        "asyncapi": "3.0.0",
        "info": {"title": "Mell's events", "version": version("mell"), "description": _ABOUT},
        "defaultContentType": CONTENT_TYPE,
        "channels": {data.TYPE: _channel(data) for data in EVENT_DATA},
        "operations": {f"send {data.TYPE}": _operation(data) for data in EVENT_DATA},
        "components": {"messages": {data.TYPE: _message(data) for data in EVENT_DATA}, "schemas": schemas},
    }


def _channel(data: type[EventData]) -> dict[str, Any]:
    return {
        "address": Subjects().event(data.TYPE),
        "messages": {data.TYPE: {"$ref": f"#/components/messages/{data.TYPE}"}},
    }


def _operation(data: type[EventData]) -> dict[str, Any]:
    return {
        "action": "send",
        "channel": {"$ref": f"#/channels/{data.TYPE}"},
        "messages": [{"$ref": f"#/channels/{data.TYPE}/messages/{data.TYPE}"}],
        "tags": [{"name": data.TELLER, "description": f"Told by a {data.TELLER}."}],
    }


def _message(data: type[EventData]) -> dict[str, Any]:
    payload = CloudEvent.model_json_schema(mode="serialization")
    payload["properties"]["type"] = {"const": data.TYPE}
    payload["properties"]["data"] = {"$ref": f"#/components/schemas/{data.__name__}"}
    return {
        "name": data.TYPE,
        "title": data.TYPE,
        "summary": " ".join((data.__doc__ or "").split()),
        "contentType": CONTENT_TYPE,
        "headers": {
            "type": "object",
            "properties": {
                "Nats-Msg-Id": {"type": "string", "description": "`source/sequence`: a repeat has the same."},
                "content-type": {"const": CONTENT_TYPE},
            },
        },
        "payload": payload,
    }


def text() -> str:
    """Return the document as it is kept."""
    return json.dumps(document(), indent=1) + "\n"


if __name__ == "__main__":
    DOCUMENT.write_text(text(), encoding="utf-8")
