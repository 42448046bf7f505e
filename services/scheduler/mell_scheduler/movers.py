"""Orders to move, sent to source workers: whatever is not an acceptance becomes an event for the core."""

from mell_scheduler.core import StartMigration
from mell_shared.bus import Bus, BusError
from mell_shared.codec import InvalidMessageError, decode, encode
from mell_shared.messages.scheduler import MigrationFailed
from mell_shared.messages.worker import WORKER_REPLY, CommandInvalid, MigrateAccepted, MigrateRefused
from mell_shared.subjects import Subjects


class Movers:
    """Asks sources; waits at most `timeout_s` for each answer."""

    def __init__(self, bus: Bus, subjects: Subjects, timeout_s: float) -> None:
        self._bus = bus
        self._subjects = subjects
        self._timeout_s = timeout_s

    async def order(self, command: StartMigration) -> MigrationFailed | None:
        """Send an order; None if the source begins, else why it does not, as far as is known."""
        order = command.order
        try:
            subject = self._subjects.worker_commands(command.source)
            reply = decode(WORKER_REPLY, await self._bus.request(subject, encode(order), self._timeout_s))
        except BusError as error:
            return _failed(command, "unreachable", str(error))
        except InvalidMessageError as error:
            return _failed(command, "unsupported", f"an answer that makes no sense: {error}")
        match reply:
            case MigrateAccepted():
                return None
            case MigrateRefused(reason=reason, message=message):
                return _failed(command, reason, message)
            case CommandInvalid(message=message):
                # A worker of a release that knows no moves.
                return _failed(command, "unsupported", message)
            case _:
                return _failed(command, "unsupported", f"answered {reply.kind}")


def _failed(command: StartMigration, reason: str, message: str) -> MigrationFailed:
    order = command.order
    return MigrationFailed(
        worker=command.source,
        migration=order.migration,
        sequence=order.sequence,
        generation=order.generation,
        reason=reason,
        message=message,
    )
