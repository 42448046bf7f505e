"""Names of processes and requests. A process id is new at every start, so it is also the incarnation."""

import re
import secrets

_NOT_IN_A_SUBJECT = re.compile(r"[^A-Za-z0-9_-]+")


def process_id(name: str) -> str:
    """Return an id for this start of a process called `name`, usable as one NATS subject token."""
    return f"{_NOT_IN_A_SUBJECT.sub('-', name).strip('-') or 'process'}-{secrets.token_hex(4)}"


def request_id(kind: str) -> str:
    """Return a fresh public id such as `chatcmpl-1f0c...`."""
    return f"{kind}-{secrets.token_hex(12)}"


def sequence_id(request: str, prompt: int, choice: int) -> str:
    """Return the id of one of a request's choices; placed, moved and streamed alone."""
    return f"{request}.{prompt}.{choice}"
