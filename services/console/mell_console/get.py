"""Asks a frontend for JSON: for commands that ask once and need no HTTP package."""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException, HTTPResponse
from typing import Any

_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Without the environment's proxies: a stack on this machine is not behind one."""


class GetError(Exception):
    """The server did not give the answer asked for; the message is one line that says why.

    `status` is its HTTP status and `told` its own words, if it answered with an error.
    """

    def __init__(self, message: str, status: int | None = None, told: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.told = told


def get_json(url: str, api_key: str = "", timeout_s: float = 10.0) -> Any:
    """Return the JSON at `url` (http or https); raises `GetError`. An error's own message is passed on."""
    return call_json("GET", url, api_key, None, timeout_s)


def call_json(method: str, url: str, key: str, body: Any, timeout_s: float) -> Any:
    """Return the JSON that a request, with `body` as JSON if it is not None, is answered with; raises `GetError`."""
    with _opened(method, url, key, body, timeout_s) as answer:
        return json.loads(answer.read())


def read_events(url: str, key: str, timeout_s: float) -> Iterator[tuple[str, str]]:
    """Yield the id and data of the server-sent events at `url` until they end; raises `GetError`.

    An event that only says how far the stream is has no data. A server that says nothing for `timeout_s` is lost.
    """
    with _opened("GET", url, key, None, timeout_s) as answer:
        fields: dict[str, str] = {}
        for line in map(bytes.decode, answer):
            name, _, value = line.rstrip("\r\n").partition(":")
            if name:
                fields[name] = value.removeprefix(" ")
            elif not line.strip() and fields:
                yield fields.get("id", ""), fields.get("data", "")
                fields = {}


@contextmanager
def _opened(method: str, url: str, key: str, body: Any, timeout_s: float) -> Iterator[HTTPResponse]:
    """Ask, and give the answer to who reads it; what goes wrong with either is a `GetError`."""
    if not url.startswith(("http://", "https://")):
        raise GetError(f"{url} is no http address")
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, method=method)  # noqa: S310 - checked above
    if data is not None:
        request.add_header("content-type", "application/json")
    if key:
        request.add_header("authorization", f"Bearer {key}")
    try:
        with _OPENER.open(request, timeout=timeout_s) as answer:
            yield answer
    except urllib.error.HTTPError as error:
        with error:
            told = _message(error.read())
            raise GetError(f"{url} answers {error.code}: {told or 'no message'}", error.code, told) from error
    except (OSError, HTTPException) as error:
        raise GetError(f"{url} does not answer: {_reason(error)}") from error
    except ValueError as error:
        raise GetError(f"{url} answers with something that is no JSON") from error


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return ""


def _reason(error: OSError | HTTPException) -> str:
    reason = getattr(error, "reason", None) or error
    return (reason.strerror or str(reason)) if isinstance(reason, OSError) else str(reason)
