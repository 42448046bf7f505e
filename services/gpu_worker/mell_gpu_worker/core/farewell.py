"""How a worker ends: finish what runs, give back the rest, leave."""

from enum import Enum

from mell_gpu_worker.core.commands import Command, Exit, PublishEvent
from mell_gpu_worker.core.evictions import Evictions
from mell_gpu_worker.core.migration.moves import Moves
from mell_gpu_worker.core.residents import Residents
from mell_gpu_worker.core.watch import FrontendWatch
from mell_shared.messages.scheduler import WorkerLeft

LINGER_US = 2_000_000
"""Once nothing runs, how long a stopping worker waits for frontends to acknowledge what has ended."""


class Stage(Enum):
    """A worker's life, in order."""

    SERVING = "serving"
    STOPPING = "stopping"
    """Takes nothing new, finishes what runs."""
    EVICTING = "evicting"
    """Has given back what did not finish, waits until its frontends know."""
    GONE = "gone"


class Farewell:
    """The stages after serving."""

    def __init__(self, residents: Residents, watch: FrontendWatch, moves: Moves) -> None:
        self.stage = Stage.SERVING
        self.evictions = Evictions(residents.worker)
        self._residents = residents
        self._watch = watch
        self._moves = moves
        self._failure = ""
        self._patience_us = 0
        """Until when to wait, for what runs, then (lingering) for acknowledgements."""
        self._lingering = False

    @property
    def wake_us(self) -> int | None:
        """When `proceed` is due at the latest, if ever."""
        return self._patience_us if self.stage is Stage.STOPPING else None

    def begin(self, deadline_us: int) -> None:
        """Stop, giving what runs until `deadline_us`."""
        self.stage = Stage.STOPPING
        self._patience_us = deadline_us

    def fail(self, failure: str, now_us: int) -> list[Command]:
        """Stop at once, for the engine has failed."""
        self._failure = failure
        return self._evict(now_us)

    def proceed(self, now_us: int) -> list[Command]:
        """Go on to the next stage if it is time."""
        said = self._proceed_stopping(now_us) if self.stage is Stage.STOPPING else []
        if self.stage is Stage.EVICTING and not self.evictions:
            self.stage = Stage.GONE
            left = WorkerLeft(worker=self._residents.worker, reason=self._failure or "stopped")
            said += [PublishEvent(left), Exit(self._failure)]
        return said

    def _proceed_stopping(self, now_us: int) -> list[Command]:
        if self._residents.live or self._moves:
            return self._evict(now_us) if now_us >= self._patience_us else []
        said: list[Command] = []
        if not self._lingering:
            self._lingering = True
            self._patience_us = now_us + LINGER_US
            said += self._watch.ask()
        if not len(self._residents.streams) or now_us >= self._patience_us:
            said += self._evict(now_us)
        return said

    def _evict(self, now_us: int) -> list[Command]:
        """Give back whatever has not finished."""
        self.stage = Stage.EVICTING
        said = self._moves.target.abandon(now_us)
        return said + self.evictions.give_back(self._residents, now_us)
