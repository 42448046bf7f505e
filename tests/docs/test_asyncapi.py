import gzip
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from docs import generate_asyncapi
from mell_shared.events import data as event_data
from mell_shared.events.data import EVENT_DATA, EventData
from mell_shared.events.envelope import enclosed

SPECIFICATION = Path(__file__).with_name("asyncapi-3.0.0.schema.json.gz")
"""Of the npm package @asyncapi/specs 6.11.1 (Apache-2.0): `schemas/3.0.0-without-$id.json`, minified."""

TEXT = ["prompt_text", "text", "output", "content", "messages", "message"]
"""Names that a field with words of users would have."""


def examples() -> list[EventData]:
    """One event of each type, with every field."""
    filler: dict[str, Any] = {
        "string": "x",
        "integer": 1,
        "number": 0.5,
        "boolean": True,
        "array": [],
        "object": {"a": 1},
    }

    def value(schema: dict[str, Any]) -> Any:
        return schema["enum"][0] if "enum" in schema else filler[schema["type"]]

    return [
        kind.model_validate({name: value(schema) for name, schema in kind.model_json_schema()["properties"].items()})
        for kind in EVENT_DATA
    ]


def test_the_document_is_what_the_models_say() -> None:
    """`make docs` writes it anew."""
    assert generate_asyncapi.DOCUMENT.read_text(encoding="utf-8") == generate_asyncapi.text()


def test_the_document_is_valid_asyncapi() -> None:
    """By the specification's own JSON schema; which refuses what is none."""
    specification = jsonschema_rs.validator_for(json.loads(gzip.decompress(SPECIFICATION.read_bytes())))
    document = generate_asyncapi.document()
    assert [f"{error.instance_path}: {error.message}" for error in specification.iter_errors(document)] == []
    document["operations"]["send worker.lost"]["action"] = "shout"
    assert not specification.is_valid(document)


def test_every_reference_leads_somewhere() -> None:
    """Which no schema can say."""
    document = generate_asyncapi.document()
    references = {
        part["$ref"] for part in walk(document) if isinstance(part, dict) and isinstance(part.get("$ref"), str)
    }
    assert references
    for reference in references:
        place: Any = document
        for name in reference.removeprefix("#/").split("/"):
            place = place[name]


def walk(part: Any) -> list[Any]:
    """The part and all in it."""
    inside = part.values() if isinstance(part, dict) else part if isinstance(part, list) else []
    return [part, *(deeper for item in inside for deeper in walk(item))]


@pytest.mark.parametrize("event", examples(), ids=lambda event: event.TYPE)
def test_what_is_written_is_what_the_document_says(event: EventData) -> None:
    """An event as it goes out has the payload of its message."""
    document = generate_asyncapi.document()
    payload = {**document["components"]["messages"][event.TYPE]["payload"], "components": document["components"]}
    written = json.loads(enclosed(event, "/mell/x/y", 1, datetime.now(UTC)).model_dump_json(exclude_none=True))
    assert [error.message for error in jsonschema_rs.validator_for(payload).iter_errors(written)] == []


def test_every_event_is_listed() -> None:
    """A model that has a type and is not in the list would be told, and not described."""
    kinds = [item for item in vars(event_data).values() if isinstance(item, type) and issubclass(item, EventData)]
    assert {kind for kind in kinds if "TYPE" in vars(kind)} == set(EVENT_DATA)
    assert len({kind.TYPE for kind in EVENT_DATA}) == len(EVENT_DATA)


def test_no_field_is_made_for_words_of_users() -> None:
    """Ids, names and numbers only."""
    for kind in EVENT_DATA:
        assert not set(kind.model_fields) & set(TEXT), kind
