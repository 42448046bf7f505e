"""What is kept towards the frontends: each sequence until its end is acknowledged, and keys that are over.

Owns who is known here, which answers a repeated command gets, and when a frontend counts as silent.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from mell_gpu_worker.core.sequence import Sequence
from mell_shared.messages.frontend import StreamStatus
from mell_shared.messages.worker import WorkerReply

REMEMBER_US = 60_000_000
"""How long a key that is over still gets its first reply; longer than any repeat can be under way."""


@dataclass(frozen=True, slots=True)
class _Past:
    generation: int
    reply: WorkerReply
    forget_us: int


@dataclass(slots=True, eq=False)
class _Frontend:
    heard_us: int
    sequences: dict[str, Sequence] = field(default_factory=dict)
    asked: bool = False
    """A status is under way."""


class Streams:
    """The sequences known here by id, live or ended, and their frontends."""

    def __init__(self, worker: str, silence_us: int) -> None:
        self._worker = worker
        self._silence_us = silence_us
        self._sequences: dict[str, Sequence] = {}
        self._replies: dict[str, WorkerReply] = {}
        self._past: OrderedDict[str, _Past] = OrderedDict()
        self._frontends: dict[str, _Frontend] = {}

    # --- sequences

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences.values())

    def find(self, sequence: str, generation: int) -> Sequence | None:
        """Return the known sequence of exactly this key."""
        found = self._sequences.get(sequence)
        return found if found is not None and found.generation == generation else None

    def older(self, sequence: str, generation: int) -> Sequence | None:
        """Return the known sequence of this id if its generation is below `generation`."""
        found = self._sequences.get(sequence)
        return found if found is not None and found.generation < generation else None

    def first_reply(self, sequence: str, generation: int) -> WorkerReply | None:
        """Return what this key's submission was answered with, if it is known or was lately."""
        if self.find(sequence, generation):
            return self._replies[sequence]
        past = self._past.get(sequence)
        return past.reply if past is not None and past.generation == generation else None

    def newest_generation(self, sequence: str) -> int:
        """Return the highest generation heard of this id lately, 0 if none."""
        known, past = self._sequences.get(sequence), self._past.get(sequence)
        return max(known.generation if known else 0, past.generation if past else 0)

    def add(self, sequence: Sequence, reply: WorkerReply, now_us: int) -> None:
        """Know `sequence`, whose submission `reply` accepted."""
        assert sequence.sequence not in self._sequences, f"{sequence.sequence} is known already"
        self._past.pop(sequence.sequence, None)
        self._sequences[sequence.sequence] = sequence
        self._replies[sequence.sequence] = reply
        frontend = self._frontends.setdefault(sequence.frontend, _Frontend(now_us))
        frontend.heard_us = now_us
        frontend.sequences[sequence.sequence] = sequence

    def forget(self, sequence: Sequence, now_us: int) -> None:
        """Keep nothing of an ended sequence but its key."""
        assert not sequence.live, f"{sequence.sequence} has not ended"
        del self._sequences[sequence.sequence]
        self.remember(sequence.sequence, sequence.generation, self._replies.pop(sequence.sequence), now_us)
        frontend = self._frontends[sequence.frontend]
        del frontend.sequences[sequence.sequence]
        if not frontend.sequences:
            del self._frontends[sequence.frontend]

    def remember(self, sequence: str, generation: int, reply: WorkerReply, now_us: int) -> None:
        """Answer repeats of this key's submission with `reply` for a while, unless a newer key is remembered."""
        past = self._past.get(sequence)
        if past is None or past.generation <= generation:
            self._past[sequence] = _Past(generation, reply, now_us + REMEMBER_US)
            self._past.move_to_end(sequence)

    def purge(self, now_us: int) -> None:
        """Drop keys that have been over for long."""
        while self._past and next(iter(self._past.values())).forget_us <= now_us:
            self._past.popitem(last=False)

    # --- frontends

    @property
    def frontends(self) -> tuple[str, ...]:
        """Frontends with a sequence here."""
        return tuple(self._frontends)

    def status(self, name: str) -> StreamStatus:
        """Return the status of all that belongs to a frontend."""
        rows = self._frontends[name].sequences.values()
        return StreamStatus(
            worker=self._worker,
            sequences=tuple(row.sequence for row in rows),
            generations=[row.generation for row in rows],
            next_indices=[row.outputs for row in rows],
            ended=[int(not row.live) for row in rows],
        )

    def unasked(self) -> list[str]:
        """Return the frontends that no status is under way to."""
        return [name for name, frontend in self._frontends.items() if not frontend.asked]

    def asked(self, name: str) -> None:
        """Note that a status is under way."""
        self._frontends[name].asked = True

    def answered(self, name: str, now_us: int, *, heard: bool) -> None:
        """Note that a status is no longer under way, and whether the frontend answered it."""
        frontend = self._frontends.get(name)
        if frontend is not None:
            frontend.asked = False
            frontend.heard_us = now_us if heard else frontend.heard_us

    def hear_all(self, now_us: int) -> None:
        """Count silence from now on only; whatever is under way is lost."""
        for frontend in self._frontends.values():
            frontend.heard_us = now_us
            frontend.asked = False

    def silent(self, now_us: int) -> list[Sequence]:
        """Return the sequences whose frontend has been silent for too long."""
        return [
            sequence
            for frontend in self._frontends.values()
            if now_us - frontend.heard_us >= self._silence_us
            for sequence in frontend.sequences.values()
        ]
