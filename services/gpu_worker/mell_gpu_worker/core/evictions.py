"""Sequences given back to their frontends: sent, repeated a few times, then left to the frontends."""

from mell_gpu_worker.core.commands import Command, SendEvicted
from mell_gpu_worker.core.residents import Residents
from mell_gpu_worker.core.sequence import Sequence
from mell_shared.messages.frontend import Evicted

ATTEMPTS = 3
"""A frontend that answers none of these finds out by the worker's silence."""


class Evictions:
    """Evictions not yet answered, by key."""

    def __init__(self, worker: str) -> None:
        self._worker = worker
        self._open: dict[tuple[str, int], tuple[SendEvicted, int]] = {}

    def __bool__(self) -> bool:
        return bool(self._open)

    def give_back(self, residents: Residents, now_us: int) -> list[Command]:
        """Give back whatever has not ended; nothing of it is kept but its key."""
        said: list[Command] = []
        for sequence in residents.live:
            said.append(self.send(sequence))
            residents.batcher.end(sequence)
            residents.streams.forget(sequence, now_us)
        return said

    def send(self, sequence: Sequence) -> SendEvicted:
        """Give `sequence` back, with all it generated."""
        message = Evicted(
            worker=self._worker,
            sequence=sequence.sequence,
            generation=sequence.generation,
            output_ids=sequence.output_ids(),
        )
        command = SendEvicted(sequence.frontend, message)
        self._open[sequence.sequence, sequence.generation] = (command, 1)
        return command

    def answered(self, sequence: str, generation: int) -> None:
        """Note that the frontend knows."""
        self._open.pop((sequence, generation), None)

    def unanswered(self, sequence: str, generation: int) -> SendEvicted | None:
        """Return the eviction to send again, or None if it is given up or settled."""
        command, attempts = self._open.pop((sequence, generation), (None, 0))
        if command is None or attempts == ATTEMPTS:
            return None
        self._open[sequence, generation] = (command, attempts + 1)
        return command
