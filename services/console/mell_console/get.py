"""GETs JSON from a frontend: for commands that ask once and need no HTTP package."""

import json
import urllib.error
import urllib.request
from typing import Any

_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Without the environment's proxies: a stack on this machine is not behind one."""


class GetError(Exception):
    """The server did not give the answer asked for; the message is one line that says why."""


def get_json(url: str, api_key: str = "", timeout_s: float = 10.0) -> Any:
    """Return the JSON at `url` (http or https); raises `GetError`. An error's own message is passed on."""
    if not url.startswith(("http://", "https://")):
        raise GetError(f"{url} is no http address")
    request = urllib.request.Request(url)  # noqa: S310 - checked above
    if api_key:
        request.add_header("authorization", f"Bearer {api_key}")
    try:
        with _OPENER.open(request, timeout=timeout_s) as answer:
            return json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            raise GetError(f"{url} answers {error.code}: {_message(error.read())}") from error
    except OSError as error:
        raise GetError(f"{url} does not answer: {_reason(error)}") from error
    except ValueError as error:
        raise GetError(f"{url} answers with something that is no JSON") from error


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return "no message"


def _reason(error: OSError) -> str:
    reason = getattr(error, "reason", None) or error
    return (reason.strerror or str(reason)) if isinstance(reason, OSError) else str(reason)
