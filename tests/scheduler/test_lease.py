"""The lease's table by hand, and many candidates over a store that answers late or not at all."""

import heapq
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mell_scheduler.lease import (
    Conflicted,
    Held,
    Lease,
    LeaseCommand,
    LeaseEvent,
    LeaseSettings,
    LeaseValue,
    Look,
    Looked,
    Unanswered,
    Write,
    Written,
)
from mell_shared.clock import ManualClock
from mell_shared.key_value import KeyValueConflictError
from mell_shared.memory_key_value import MemoryBucket

SECOND = 1_000_000
MINE = LeaseValue("me", 100)
OTHERS = LeaseValue("other", 200)


def leading(now_us: int = 0) -> Lease:
    """A lease that this scheduler took at `now_us`, at revision 5."""
    lease = Lease("me", LeaseSettings())
    lease.handle(Looked(None), now_us, 100)
    lease.handle(Written(MINE, 5, now_us), now_us, 100)
    assert lease.leads(now_us)
    return lease


def test_a_free_lease_is_taken_at_once() -> None:
    """The term is the wall clock's, so that it exceeds all before it even when their record has expired."""
    lease = Lease("me", LeaseSettings())
    assert lease.handle(Looked(None), 7, unix_ms=100) == Write(MINE, 0, 7)
    assert not lease.leads(7)


def test_another_leader_is_left_alone_and_watched() -> None:
    """A held lease is looked at again later."""
    lease = Lease("me", LeaseSettings())
    assert lease.handle(Looked(Held(OTHERS, 3)), 0, 100) == Look(SECOND)
    assert not lease.leads(0)


def test_the_term_exceeds_every_term_seen() -> None:
    """A wall clock that is behind does not lower the term."""
    lease = Lease("me", LeaseSettings())
    lease.handle(Looked(Held(OTHERS, 3)), 0, 100)
    assert lease.handle(Looked(None), SECOND, unix_ms=100) == Write(LeaseValue("me", 201), 0, SECOND)


def test_who_took_it_leads_and_renews() -> None:
    """Times count from the sending of the write, not from its answer."""
    lease = Lease("me", LeaseSettings())
    lease.handle(Looked(None), 0, 100)
    assert lease.handle(Written(MINE, 5, sent_us=10), 900_000, 100) == Write(MINE, 5, 1_500_010)
    assert lease.leads(3_500_009)
    assert not lease.leads(3_500_010)


def test_an_answer_that_comes_too_late_makes_no_leader() -> None:
    """A write confirmed after its time is worth nothing."""
    lease = Lease("me", LeaseSettings())
    lease.handle(Looked(None), 0, 100)
    assert lease.handle(Written(MINE, 5, 0), 4 * SECOND, 100) == Look(4 * SECOND)
    assert lease.held is None


def test_a_renewal_without_an_answer_is_repeated_until_the_time_is_up() -> None:
    """The write may or may not have arrived; leading ends on time in any case."""
    lease = leading()
    assert lease.handle(Unanswered(), 2 * SECOND, 100) == Write(MINE, 5, 2_300_000)
    assert lease.leads(2 * SECOND)
    assert lease.handle(Unanswered(), 3_500_000, 100) == Look(4_500_000)
    assert not lease.leads(3_500_000)


def test_a_conflict_while_leading_may_be_with_oneself() -> None:
    """An unanswered renewal that did arrive is found and built upon."""
    lease = leading()
    assert lease.handle(Conflicted(), SECOND, 100) == Look(SECOND)
    assert lease.handle(Looked(Held(MINE, 6)), SECOND, 100) == Write(MINE, 6, SECOND)
    assert lease.leads(SECOND)


@pytest.mark.parametrize("seen", [Held(OTHERS, 9), None], ids=["another's", "nobody's"])
def test_a_lease_found_lost_ends_leading_at_once(seen: Held | None) -> None:
    """Whoever sees that the key is not its own does not wait for its time to run out."""
    lease = leading()
    lease.handle(Conflicted(), SECOND, 100)
    lease.handle(Looked(seen), SECOND, 100)
    assert not lease.leads(SECOND)


def test_losing_the_race_for_a_free_lease() -> None:
    """Another was faster: look again later."""
    lease = Lease("me", LeaseSettings())
    lease.handle(Looked(None), 0, 100)
    assert lease.handle(Conflicted(), 10, 100) == Look(SECOND + 10)


def test_a_taking_whose_answer_was_lost_is_found_again() -> None:
    """The key says that it is ours: taking it again makes sure, and leading counts from that."""
    lease = Lease("me", LeaseSettings())
    lease.handle(Looked(None), 0, 100)
    assert lease.handle(Unanswered(), SECOND, 100) == Look(2 * SECOND)
    assert lease.handle(Looked(Held(MINE, 5)), 2 * SECOND, 100) == Write(LeaseValue("me", 101), 5, 2 * SECOND)
    assert not lease.leads(2 * SECOND)


@pytest.mark.parametrize("seen", [Looked(Held(MINE, 6)), Written(MINE, 6, 3 * SECOND)], ids=["looked", "late answer"])
def test_who_stopped_leading_begins_again_in_a_new_term(seen: LeaseEvent) -> None:
    """Also while the key is still its own: moves are numbered from one in each term, and workers know the old ones."""
    lease = leading()
    assert lease.lapse(4 * SECOND)
    again = LeaseValue("me", 101)
    assert lease.handle(seen, 4 * SECOND, 100) == Write(again, 6, 4 * SECOND)
    lease.handle(Written(again, 7, 4 * SECOND), 4 * SECOND, 100)
    assert lease.held == Held(again, 7)


def test_lapsing_is_told_once() -> None:
    """The shell learns of the end exactly once."""
    lease = leading()
    assert not lease.lapse(3 * SECOND)
    assert lease.lapse(4 * SECOND)
    assert not lease.lapse(5 * SECOND)


def test_a_value_reads_back() -> None:
    """What is written can be read."""
    assert LeaseValue.from_bytes(OTHERS.to_bytes()) == OTHERS


@pytest.mark.parametrize("data", [b"", b"\xff", b"[]", b"7", b'{"scheduler": "x"}', b'{"scheduler": "x", "term": "y"}'])
def test_an_unreadable_value_is_somebody_elses(data: bytes) -> None:
    """Rubbish in the bucket stops nobody for longer than its time to live, and crashes nobody."""
    assert LeaseValue.from_bytes(data) == LeaseValue("", 0)


def test_times_that_allow_two_leaders_are_refused() -> None:
    """A leader must stop before its key can expire."""
    with pytest.raises(AssertionError):
        Lease("me", LeaseSettings(ttl_us=3 * SECOND))


class Election:
    """Candidates in virtual time over one bucket; each call to the store may be delayed or lost, both ways."""

    def __init__(self, seed: int, candidates: int) -> None:
        self.random = random.Random(seed)
        self.clock = ManualClock()
        self.bucket = MemoryBucket(self.clock, 5 * SECOND)
        self.leases = [Lease(f"c{number}", LeaseSettings()) for number in range(candidates)]
        self.agenda: list[tuple[int, int, str, int, object]] = []
        self.count = 0
        self.loss = 0.3
        self.terms: dict[int, int] = {}
        self.ended: set[int] = set()
        self.led: list[int | None] = [None] * candidates
        self.waits: dict[int, int] = {}
        for number in range(candidates):
            self.later(0, "ask", number, Look(0))

    def later(self, at_us: int, what: str, number: int, detail: object) -> None:
        """Something happens to a candidate at a time."""
        self.count += 1
        heapq.heappush(self.agenda, (max(at_us, self.clock.now_us()), self.count, what, number, detail))

    def delay_us(self) -> int:
        """The network's delay this time."""
        return self.random.choice((1_000, 1_000, 50_000, 400_000, 2 * SECOND))

    def run(self, until_us: int) -> None:
        """Go on until a time, checking at each step that no two lead."""
        while self.agenda[0][0] <= until_us:
            at_us, _, what, number, detail = heapq.heappop(self.agenda)
            self.clock.advance_us(at_us - self.clock.now_us())
            if what == "ask":
                self.ask(number, detail)  # type: ignore[arg-type]
            elif what == "arrive":
                self.arrive(number, *detail)  # type: ignore[misc]
            else:
                self.answer(number, *detail)  # type: ignore[misc]
            self.check()

    def ask(self, number: int, command: LeaseCommand) -> None:
        """A candidate sends its command, and gives up waiting after a second."""
        now_us, token = self.clock.now_us(), self.count
        self.waits[number] = token
        self.later(now_us + SECOND, "answer", number, (token, Unanswered()))
        if self.random.random() >= self.loss:
            self.later(now_us + self.delay_us(), "arrive", number, (token, command, now_us))

    def arrive(self, number: int, token: int, command: LeaseCommand, sent_us: int) -> None:
        """The store does what it is asked, however late; its answer may get lost too."""
        event: LeaseEvent
        if isinstance(command, Write):
            try:
                revision = self.bucket.replace("leader", command.value.to_bytes(), command.revision)
                event = Written(command.value, revision, sent_us)
            except KeyValueConflictError:
                event = Conflicted()
        else:
            entry = self.bucket.read("leader")
            event = Looked(None if entry is None else Held(LeaseValue.from_bytes(entry.value), entry.revision))
        if self.random.random() >= self.loss:
            self.later(self.clock.now_us() + self.delay_us(), "answer", number, (token, event))

    def answer(self, number: int, token: int, event: LeaseEvent) -> None:
        """The first answer, or the timeout, counts."""
        if self.waits[number] != token:
            return
        self.waits[number] = -1
        now_us = self.clock.now_us()
        command = self.leases[number].handle(event, now_us, unix_ms=now_us // 1_000_000)
        self.later(command.at_us, "ask", number, command)

    def check(self) -> None:
        """At most one leads, no two ever lead in one term, and none again in a term in which it stopped."""
        now_us = self.clock.now_us()
        for number, lease in enumerate(self.leases):
            lease.lapse(now_us)
            term = lease.held.value.term if lease.held else None
            led = self.led[number]
            if led is not None and led != term:
                self.ended.add(led)
            assert term not in self.ended, "a term begins anew"
            self.led[number] = term
        leaders = [number for number, lease in enumerate(self.leases) if lease.leads(now_us)]
        assert len(leaders) <= 1, "two lead"
        for number in leaders:
            held = self.leases[number].held
            assert held is not None
            assert self.terms.setdefault(held.value.term, number) == number, "a term was led by two"


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), candidates=st.integers(2, 4))
def test_never_two_leaders_and_always_one_in_the_end(seed: int, candidates: int) -> None:
    """Whatever the network does there is at most one leader; when it calms down there soon is one, and it stays."""
    election = Election(seed, candidates)
    election.run(60 * SECOND)
    election.loss = 0.0
    election.delay_us = lambda: 1_000  # type: ignore[method-assign]
    election.run(75 * SECOND)
    leaders = [lease for lease in election.leases if lease.leads(election.clock.now_us())]
    assert len(leaders) == 1
    election.run(90 * SECOND)
    assert [lease for lease in election.leases if lease.leads(election.clock.now_us())] == leaders
