"""The OpenAPI document as one plain page that needs no script and no other host; pure."""

from html import escape
from typing import Any

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "code{background:#eee;padding:0 .3em}td,th{text-align:left;padding:.1rem 1rem .1rem 0;vertical-align:top}"
    "section{border-top:1px solid #ccc;margin-top:1.5rem}"
)


def openapi_page(document: dict[str, Any]) -> str:
    """Return HTML that lists every operation and the fields of its body."""
    title = escape(f"{document['info']['title']} {document['info']['version']}")
    schemas = document.get("components", {}).get("schemas", {})
    sections = [
        _section(method, path, operation, schemas)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f'<h1>{title}</h1><p>OpenAI-compatible; the whole document: <a href="/openapi.json">openapi.json</a></p>'
        f"{''.join(sections)}</html>"
    )


def _section(method: str, path: str, operation: dict[str, Any], schemas: dict[str, Any]) -> str:
    head = f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{escape(operation.get('summary', ''))}</p>"
    body = operation.get("requestBody")
    if body is None:
        return f"<section>{head}</section>"
    schema = schemas[body["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]]
    required = schema.get("required", [])
    rows = [_row(name, field, needed=name in required) for name, field in schema["properties"].items()]
    table = f"<table><tr><th>field</th><th>type</th><th>default</th></tr>{''.join(rows)}</table>"
    return f"<section>{head}<p>{escape(schema.get('description', ''))}</p>{table}</section>"


def _row(name: str, field: dict[str, Any], *, needed: bool) -> str:
    default = "required" if needed else escape(repr(field.get("default")))
    return f"<tr><td><code>{escape(name)}</code></td><td>{escape(_type(field))}</td><td>{default}</td></tr>"


def _type(field: dict[str, Any]) -> str:
    """Return a field's type in words, without what it is made of."""
    for several in ("anyOf", "oneOf"):
        if several in field:
            return " or ".join(dict.fromkeys(_type(part) for part in field[several]))
    if "$ref" in field:
        return str(field["$ref"].rpartition("/")[2])
    if "enum" in field or "const" in field:
        return ", ".join(map(repr, field.get("enum", [field.get("const")])))
    if field.get("type") == "array":
        return f"list of {_type(field.get('items', {}))}"
    return str(field.get("type", "anything"))
