"""What a shell offers where a worker is asked for: the names of those that are there, or nothing."""

from mell_console.admin.ask import AdminError, Frontend
from mell_shared.messages.admin import STATUS

_PATIENCE_S = 1.0
"""Somebody has pressed a key and waits."""


def workers(url: str, admin_key: str, begun: str) -> list[str]:
    """Return the names that begin so; where two share one, their ids."""
    try:
        status = Frontend(url, admin_key, _PATIENCE_S).get("status", STATUS)
    except AdminError:
        return []
    names = [worker.name for worker in status.workers]
    offered = [worker.name if names.count(worker.name) == 1 else worker.worker for worker in status.workers]
    return sorted(name for name in offered if name.startswith(begun))
