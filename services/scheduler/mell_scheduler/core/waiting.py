"""The bounded queue of requests without a place: ordered by priority, then by time waited, for each model."""

from bisect import bisect_left, insort

from mell_scheduler.core.pace import Pace
from mell_scheduler.core.values import Handle, Reply
from mell_shared.messages.scheduler import PlaceReply, PlaceRequest

_MOST_WAITED_S = 3_600
_Key = tuple[int, int, int]


class Waiting:
    """One request without a place; `handle` is None between a `Queued` reply and the frontend's repeat."""

    __slots__ = ("handle", "hold_until_us", "key", "renewed_us", "request")

    def __init__(self, request: PlaceRequest, handle: Handle, key: _Key) -> None:
        self.request = request
        self.handle: Handle | None = handle
        self.key = key
        self.hold_until_us = 0
        self.renewed_us = 0

    def waited_us(self, now_us: int) -> int:
        """How long it has waited, at any scheduler."""
        return now_us - self.key[1]

    def answer(self, reply: PlaceReply) -> Reply:
        """Answer the ask that is held; only once for each."""
        assert self.handle is not None, "somebody asks"
        handle, self.handle = self.handle, None
        return Reply(handle, self.request.sequence, reply)


class WaitingQueue:
    """All waiting requests, one for each sequence. Order: higher priority, longer wait, earlier arrival."""

    def __init__(self, hold_us: int, renew_us: int) -> None:
        self._hold_us = hold_us
        self._renew_us = renew_us
        self._by_sequence: dict[str, Waiting] = {}
        self._by_model: dict[str, list[tuple[_Key, Waiting]]] = {}
        self._paces: dict[str, Pace] = {}
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._by_sequence)

    def get(self, sequence: str) -> Waiting | None:
        """The waiting request of a sequence."""
        return self._by_sequence.get(sequence)

    def everybody(self) -> list[Waiting]:
        """All, in order of first arrival."""
        return list(self._by_sequence.values())

    def asking(self) -> list[Waiting]:
        """Those whose frontend awaits a reply, in order of first arrival."""
        return [entry for entry in self._by_sequence.values() if entry.handle is not None]

    def held_too_long(self, now_us: int) -> list[Waiting]:
        """Those whose frontend should be told now that there is no room yet."""
        return [entry for entry in self.asking() if now_us >= entry.hold_until_us]

    def forsaken(self, now_us: int) -> list[Waiting]:
        """Those whose frontend has not asked again for too long."""
        left = [entry for entry in self._by_sequence.values() if entry.handle is None]
        return [entry for entry in left if now_us - entry.renewed_us > self._renew_us]

    def add(self, request: PlaceRequest, handle: Handle, now_us: int) -> Waiting:
        """Queue a request by its priority and the time it says it has waited."""
        assert request.sequence not in self._by_sequence, "a sequence waits once"
        self._arrivals += 1
        # The least first: so many seconds may be more microseconds than a number can be.
        waited_us = int(min(_MOST_WAITED_S, request.waited_s) * 1_000_000)
        entry = Waiting(request, handle, (-request.priority, now_us - waited_us, self._arrivals))
        self._held(entry, now_us)
        self._by_sequence[request.sequence] = entry
        if request.model not in self._by_model:
            self._by_model[request.model], self._paces[request.model] = [], Pace(now_us)
        insort(self._by_model[request.model], (entry.key, entry), key=_key_of)
        return entry

    def renew(self, entry: Waiting, request: PlaceRequest, handle: Handle, now_us: int) -> None:
        """The frontend asked again: it keeps its position."""
        assert request.model == entry.request.model, "a repeat is for the same model"
        entry.request, entry.handle = request, handle
        self._held(entry, now_us)

    def _held(self, entry: Waiting, now_us: int) -> None:
        entry.renewed_us = now_us
        entry.hold_until_us = now_us + self._hold_us

    def placed(self, entry: Waiting, now_us: int) -> None:
        """The request waits no more, because it got a place."""
        self._paces[entry.request.model].add(now_us)
        self.remove(entry)

    def wait_us(self, model: str, now_us: int) -> int | None:
        """How long the last of a model's line will wait at its present pace; None while that is not known."""
        line = self._by_model.get(model)
        return None if line is None else self._paces[model].wait_us(len(line), now_us)

    def remove(self, entry: Waiting) -> None:
        """The request waits no more."""
        del self._by_sequence[entry.request.sequence]
        line = self._by_model[entry.request.model]
        del line[self.position(entry)]
        if not line:
            del self._by_model[entry.request.model]
            del self._paces[entry.request.model]

    def position(self, entry: Waiting) -> int:
        """How many of its model are before it."""
        return bisect_left(self._by_model[entry.request.model], entry.key, key=_key_of)

    def first(self, model: str, count: int) -> list[Waiting]:
        """The first `count` of a model, in order."""
        return [entry for _, entry in self._by_model.get(model, [])[:count]]

    def of(self, model: str) -> list[Waiting]:
        """All of a model, in order."""
        return [entry for _, entry in self._by_model.get(model, [])]

    def last(self) -> Waiting:
        """The last in order of all models; the queue must not be empty."""
        return max((line[-1] for line in self._by_model.values()), key=_key_of)[1]

    def check(self) -> None:
        """Assert that both indices hold the same entries, in order. For tests; slow."""
        listed = [pair for line in self._by_model.values() for pair in line]
        assert len(listed) == len(self._by_sequence), "an entry is listed twice or not at all"
        assert self._paces.keys() == self._by_model.keys(), "a line without a pace, or a pace without a line"
        for model, line in self._by_model.items():
            assert line, "an empty line is kept"
            assert [key for key, _ in line] == sorted(key for key, _ in line), "a line is out of order"
            for position, (key, entry) in enumerate(line):
                assert entry.key == key
                assert entry.request.model == model
                assert self.position(entry) == position
                assert self._by_sequence[entry.request.sequence] is entry


def _key_of(pair: tuple[_Key, Waiting]) -> _Key:
    return pair[0]
