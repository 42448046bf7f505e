"""Being emptied without leaving: takes nothing new, serves on, gives back at the deadline what is left."""

from mell_gpu_worker.core.commands import Command
from mell_gpu_worker.core.evictions import Evictions
from mell_gpu_worker.core.residents import Residents
from mell_gpu_worker.core.terms import Terms
from mell_shared.messages.worker import Drain, DrainRefused, DrainSet, Undrain


class Draining:
    """Whether a scheduler has this worker drained. Told in each report, so that the next leader knows it too."""

    def __init__(self, residents: Residents, evictions: Evictions, terms: Terms) -> None:
        self.on = False
        self._residents = residents
        self._evictions = evictions
        self._terms = terms
        self._deadline_us: int | None = None
        self._overdue = False
        """The deadline has passed: whatever is here still, or comes only now, is given back."""

    @property
    def wake_us(self) -> int | None:
        """When `proceed` is due at the latest, if ever."""
        return self._deadline_us

    def obey(self, order: Drain | Undrain, now_us: int, *, stopping: bool) -> DrainSet | DrainRefused:
        """Begin, change the deadline, or end; a worker that is about to stop drains anyhow."""
        if not self._terms.admits(order.term):
            text = self._terms.refusal(order.term)
            return DrainRefused(reason="term", message=text, term=self._terms.highest)
        if stopping:
            text = "this worker is about to stop"
            return DrainRefused(reason="stopping", message=text, term=self._terms.highest)
        self.on = isinstance(order, Drain)
        self._deadline_us, self._overdue = None, False
        if isinstance(order, Drain) and order.deadline_s is not None:
            self._deadline_us = now_us + round(order.deadline_s * 1e6)
        return DrainSet(draining=self.on, sequences=len(self._residents.live))

    def proceed(self, now_us: int) -> list[Command]:
        """Give back what is left once the deadline has come, and then what a claim of before still brings here."""
        if self._deadline_us is not None and now_us >= self._deadline_us:
            self._deadline_us, self._overdue = None, True
        return self._evictions.give_back(self._residents, now_us) if self._overdue else []
