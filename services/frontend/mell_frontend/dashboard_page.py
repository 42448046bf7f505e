"""The dashboard's files, read once: a page that asks `/admin` for all it shows, and nobody else for anything."""

import hashlib
from importlib.resources import files

from fastapi import Request, Response

_HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
"""Nothing from elsewhere, nothing inline: what a worker or a request is called can never become code."""

_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


def _page(content: bytes, kind: str) -> tuple[bytes, dict[str, str]]:
    tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
    return content, {**_HEADERS, "etag": tag, "content-type": f"{kind}; charset=utf-8"}


PAGES: dict[str, tuple[bytes, dict[str, str]]] = {
    "/dashboard" if file.name == "index.html" else f"/dashboard/{file.name}": _page(file.read_bytes(), _TYPES[suffix])
    for file in sorted(files("mell_frontend").joinpath("dashboard").iterdir(), key=lambda file: file.name)
    if (suffix := "." + file.name.rpartition(".")[2]) in _TYPES
}
"""Path -> content and headers."""


async def dashboard(request: Request) -> Response:
    """Answer with one of `PAGES`."""
    content, headers = PAGES[request.scope["path"]]
    if request.headers.get("if-none-match") == headers["etag"]:
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers)
