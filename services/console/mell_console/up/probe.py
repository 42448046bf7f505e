"""Asks the frontend whether the stack works as a whole: each service may be ready before they know each other."""

import asyncio
import time

from mell_console.get import GetError, get_json
from mell_shared.process import StartError

_POLL_S = 0.1
_ANSWER_S = 5.0
_USABLE = {"active", "standby"}  # standby: empty, and woken by the first request


async def await_workers(url: str, admin_key: str, workers: int, deadline_s: float) -> None:
    """Return when the frontend is ready and its scheduler knows `workers` workers.

    `deadline_s` is of the monotonic clock. Raises `StartError`.
    """
    seen = "nothing yet"
    while time.monotonic() < deadline_s:
        seen = await asyncio.to_thread(_missing, url, admin_key, workers)
        if not seen:
            return
        await asyncio.sleep(_POLL_S)
    raise StartError(f"the services run but do not work together in time ({seen}): see the logs")


def _missing(url: str, admin_key: str, workers: int) -> str:
    """Return what is still missing, or nothing."""
    try:
        get_json(f"{url}/ready", "", _ANSWER_S)
        status = get_json(f"{url}/admin/status", admin_key, _ANSWER_S)
    except GetError as error:
        return str(error)
    usable = [worker for worker in status.get("workers", []) if worker.get("state") in _USABLE]
    return "" if len(usable) >= workers else f"{len(usable)} of {workers} workers are known to the scheduler"
