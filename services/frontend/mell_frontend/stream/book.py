"""The stream core's tables: open sequences, by owner too, and the memory of ended ones; kept consistent here."""

from dataclasses import dataclass, field

from mell_frontend.stream.sequence import Sequence
from mell_frontend.stream.states import OWNED, State
from mell_shared.messages.worker import Cancel


@dataclass(slots=True)
class Owner:
    """A worker that owns sequences, and when it last gave a sign of life (or we began to listen for one)."""

    heard_us: int
    suspected: bool = False
    """Whether it was asked for a sign of life since."""
    sequences: dict[str, Sequence] = field(default_factory=dict)


@dataclass(slots=True)
class PendingCancel:
    """A cancel that the worker has not confirmed."""

    worker: str
    message: Cancel
    retry_at_us: int | None
    """None while one is on its way."""


class Book:
    """All sequences of a frontend; dicts keep their order, so that a run can be repeated exactly."""

    def __init__(self, max_ended: int) -> None:
        self.open: dict[str, Sequence] = {}
        self.owners: dict[str, Owner] = {}
        self.backing_off: dict[str, Sequence] = {}
        self.ended: dict[str, int] = {}
        """Name to time of end, oldest first."""
        self.cancels: dict[str, PendingCancel] = {}
        """By name of an ended sequence."""
        self._max_ended = max_ended

    def add(self, sequence: Sequence) -> None:
        """Open a sequence whose name is new."""
        assert sequence.name not in self.open, f"{sequence.name} is open already"
        assert sequence.name not in self.ended, f"{sequence.name} was used before"
        self.open[sequence.name] = sequence

    def give(self, sequence: Sequence, worker: str, now_us: int) -> None:
        """Make `worker` the owner of a sequence that has none, in a generation that never had one."""
        assert sequence.owner is None, f"{sequence.name} belongs to {sequence.owner}"
        sequence.owner = worker
        self.owners.setdefault(worker, Owner(heard_us=now_us)).sequences[sequence.name] = sequence

    def take(self, sequence: Sequence) -> str:
        """Take a sequence from its owner, whose name is returned, and begin a new generation."""
        worker = self._release(sequence)
        sequence.raise_generation()
        return worker

    def end(self, sequence: Sequence, now_us: int) -> None:
        """Close a sequence and remember its name."""
        assert sequence.state is State.ENDED
        if sequence.owner is not None:
            self._release(sequence)
        del self.open[sequence.name]
        self.backing_off.pop(sequence.name, None)
        self.ended[sequence.name] = now_us
        if len(self.ended) > self._max_ended:
            self._forget(next(iter(self.ended)))

    def forget_ended(self, before_us: int) -> None:
        """Forget the sequences that ended before that time, with their unconfirmed cancels."""
        while self.ended:
            name, ended_us = next(iter(self.ended.items()))
            if ended_us >= before_us:
                return
            self._forget(name)

    def hear(self, worker: str, now_us: int) -> Owner | None:
        """Note a sign of life; returns the worker's record if it owns anything."""
        owner = self.owners.get(worker)
        if owner is not None:
            owner.heard_us = now_us
            owner.suspected = False
        return owner

    def _release(self, sequence: Sequence) -> str:
        worker = sequence.owner
        assert worker is not None, f"{sequence.name} has no owner"
        owner = self.owners[worker]
        del owner.sequences[sequence.name]
        if not owner.sequences:
            del self.owners[worker]
        sequence.owner = None
        return worker

    def _forget(self, name: str) -> None:
        del self.ended[name]
        self.cancels.pop(name, None)

    def check(self) -> None:
        """Derive every index again and assert that it agrees."""
        for name, sequence in self.open.items():
            assert name == sequence.name
            sequence.check()
        owned = {s.name: s.owner for s in self.open.values() if s.state in OWNED}
        indexed = {name: worker for worker, owner in self.owners.items() for name in owner.sequences}
        assert indexed == owned, "owners' sequences and sequences' owners differ"
        assert all(owner.sequences for owner in self.owners.values()), "an owner of nothing is remembered"
        paused = [name for name, sequence in self.open.items() if sequence.state is State.BACKING_OFF]
        assert sorted(paused) == sorted(self.backing_off)
        assert not self.open.keys() & self.ended.keys(), "a sequence is open and ended"
        assert self.cancels.keys() <= self.ended.keys(), "a cancel of a sequence that is open or forgotten"
        assert len(self.ended) <= self._max_ended
        ends = list(self.ended.values())
        assert ends == sorted(ends)
