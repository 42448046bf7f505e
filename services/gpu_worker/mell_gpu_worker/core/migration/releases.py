"""Releases sent to targets: repeated a few times, then left to the reservations' expiry."""

from mell_gpu_worker.core.commands import AskPeer, Command
from mell_gpu_worker.core.events import PeerUnanswered
from mell_shared.messages.worker import ReleaseKv

_ATTEMPTS = 3


class Releases:
    """Releases not yet answered, by migration."""

    def __init__(self, timeout_us: int) -> None:
        self._timeout_us = timeout_us
        self._attempts: dict[str, int] = {}

    def send(self, worker: str, migration: str) -> Command:
        """Tell a target that a migration is off."""
        self._attempts[migration] = self._attempts.get(migration, 0) + 1
        return AskPeer(worker, ReleaseKv(migration=migration), self._timeout_us)

    def answered(self, message: ReleaseKv) -> None:
        """The target knows."""
        self._attempts.pop(message.migration, None)

    def unanswered(self, event: PeerUnanswered) -> list[Command]:
        """Try again, unless the target is gone or was told often enough."""
        migration = event.message.migration
        attempts = self._attempts.get(migration, 0)
        if event.failure == "no_responder" or not 0 < attempts < _ATTEMPTS:
            self._attempts.pop(migration, None)
            return []
        return [self.send(event.worker, migration)]
