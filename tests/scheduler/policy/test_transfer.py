"""Adaptive transfer: which moves copy, which prefill, which do both, and which wait."""

from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from mell_scheduler.policy.base import Move, Reason
from mell_scheduler.policy.transfer import (
    Budgets,
    Candidate,
    Division,
    Mode,
    PrefillProfile,
    RateEstimate,
    divide,
    split_point,
)

SECOND_US = 1_000_000


def candidate(
    name: str,
    tokens: int,
    reason: Reason = Reason.CONSOLIDATE,
    links: tuple[str, ...] = ("a>b",),
    modes: frozenset[Mode] = frozenset(Mode),
) -> Candidate:
    """A move of `tokens` tokens of 10 bytes from a to b."""
    return Candidate(Move(name, "a", "b", tokens, reason), tokens, 10, links, modes)


def budgets(link: int, prefill: int, moves: int = 1_000, total_bytes: int = 1 << 40) -> Budgets:
    """One link and one target."""
    return Budgets({"a>b": link}, {"b": prefill}, SECOND_US, moves, total_bytes)


def modes(division: Division) -> list[tuple[str, Mode, int]]:
    """(item, mode, recomputed tokens), in order."""
    return [(t.move.item_id, t.mode, t.recomputed_tokens) for t in division.transfers]


def test_a_fast_link_copies() -> None:
    """With a link cheaper than prefill, KV travels."""
    division = divide([candidate("i", 100)], budgets(link=100_000, prefill=1_000))
    assert modes(division) == [("i", Mode.KV, 0)]
    assert division.transfers[0].copied_bytes == 1_000
    assert division.transfers[0].predicted_us == 10_000


def test_a_slow_link_prefills() -> None:
    """With prefill cheaper than the link, token ids travel."""
    division = divide([candidate("i", 100)], budgets(link=1_000, prefill=1_000))
    assert modes(division) == [("i", Mode.TOKENS, 100)]
    assert division.transfers[0].predicted_us == 100_000


def test_what_is_left_goes_into_the_other_bin() -> None:
    """When the cheaper bin is full, the other one takes the rest."""
    division = divide([candidate(n, 80) for n in "abc"], budgets(link=1_700, prefill=100))
    assert modes(division) == [("a", Mode.KV, 0), ("b", Mode.KV, 0), ("c", Mode.TOKENS, 80)]


def test_hybrid_uses_what_both_bins_have_left() -> None:
    """A move too big for either bin is split between them."""
    division = divide([candidate("i", 160)], budgets(link=1_000, prefill=100))
    ((_, mode, recomputed),) = modes(division)
    assert mode is Mode.HYBRID
    assert recomputed == 80
    assert division.transfers[0].copied_bytes == 800


def test_what_fits_neither_is_deferred() -> None:
    """With both bins full a move waits."""
    division = divide([candidate("i", 400)], budgets(link=1_000, prefill=100))
    assert division.transfers == []
    assert [move.item_id for move in division.deferred] == ["i"]


def test_urgent_moves_go_first() -> None:
    """Overload is relieved before a drain, a drain before consolidation, whatever their sizes."""
    wanted = [
        candidate("consolidate", 90),
        candidate("drain", 50, Reason.DRAIN),
        candidate("overload", 40, Reason.OVERLOAD),
    ]
    division = divide(wanted, budgets(link=1_000, prefill=1))
    assert [t.move.item_id for t in division.transfers] == ["overload", "drain"]
    assert [m.item_id for m in division.deferred] == ["consolidate"]


def test_those_who_lose_most_choose_first() -> None:
    """Among equals the order is by cost difference: the large move gets the cheap bin."""
    division = divide([candidate("small", 10), candidate("large", 100)], budgets(link=1_050, prefill=50))
    assert modes(division) == [("large", Mode.KV, 0), ("small", Mode.TOKENS, 10)]


def test_links_are_shared_by_all_that_cross_them() -> None:
    """Two moves over one uplink share its bytes, though their targets differ."""
    one = Candidate(Move("i", "a", "b", 100, Reason.DRAIN), 100, 10, ("a", "b"))
    two = Candidate(Move("j", "a", "c", 100, Reason.DRAIN), 100, 10, ("a", "c"))
    division = divide([one, two], Budgets({"a": 1_500, "b": 5_000, "c": 5_000}, {}, SECOND_US))
    assert modes(division) == [("i", Mode.KV, 0)]


def test_budgets_of_moves_and_bytes_hold() -> None:
    """An operator's limits on count and bytes defer the rest."""
    three = [candidate(n, 10) for n in "abc"]
    assert len(divide(three, budgets(10_000, 10_000, moves=2)).transfers) == 2
    by_bytes = divide(three, budgets(100_000, 0, total_bytes=250))
    assert modes(by_bytes) == [("a", Mode.KV, 0), ("b", Mode.KV, 0)]


def test_no_link_takes_more_moves_at_once_than_it_can() -> None:
    """Whatever their mode: the rest is deferred, over another link they go at once."""
    kv, tokens = frozenset({Mode.KV}), frozenset({Mode.TOKENS})
    narrow = [
        Candidate(Move(n, "a", "b", 10, Reason.DRAIN), 10, 10, ("a", "b"), m) for n, m in (("i", kv), ("j", tokens))
    ]
    beside = Candidate(Move("k", "a", "c", 10, Reason.DRAIN), 10, 10, ("a", "c"))
    rooms = {"a": 9_000, "b": 9_000, "c": 9_000}
    division = divide([*narrow, beside], Budgets(rooms, {"b": 900}, SECOND_US, link_moves={"a": 2, "b": 1}))
    assert {name for name, _, _ in modes(division)} == {"i", "k"}
    assert [move.item_id for move in division.deferred] == ["j"]


@pytest.mark.parametrize("only", [Mode.KV, Mode.TOKENS])
def test_an_engine_without_a_mode_is_not_given_it(only: Mode) -> None:
    """A target that can do one thing only is asked for that only."""
    division = divide([candidate("i", 50, modes=frozenset({only}))], budgets(1_000, 1_000))
    assert [mode for _, mode, _ in modes(division)] == [only]


def test_an_unknown_link_or_worker_has_no_budget() -> None:
    """What was not profiled is not used."""
    assert divide([candidate("i", 10)], Budgets({}, {}, SECOND_US)).transfers == []


def test_both_halves_end_together() -> None:
    """The split point makes copying and prefilling equally long, at a block's boundary."""
    assert split_point(1_600, copy_us_per_token=1.0, prefill_us_per_token=3.0, block_tokens=16) == 400
    assert split_point(1_600, copy_us_per_token=0.0, prefill_us_per_token=3.0, block_tokens=16) == 0
    assert split_point(10, copy_us_per_token=1.0, prefill_us_per_token=0.0, block_tokens=16) == 10


CANDIDATES = st.lists(
    st.builds(
        lambda n, tokens, reason, target, allowed: Candidate(
            Move(f"i{n}", "a", target, tokens, reason), tokens, 10, ("a", target), frozenset(allowed)
        ),
        st.integers(0, 10_000),
        st.integers(1, 400),
        st.sampled_from(Reason),
        st.sampled_from(("b", "c")),
        st.sets(st.sampled_from(Mode), min_size=1),
    ),
    max_size=12,
)


@settings(max_examples=300, deadline=None)
@given(
    CANDIDATES,
    st.tuples(st.integers(0, 6_000), st.integers(0, 6_000)),
    st.integers(0, 600),
    st.integers(0, 10),
    st.fixed_dictionaries({}, optional={"a": st.integers(0, 8), "b": st.integers(0, 4)}),
)
def test_no_budget_is_ever_exceeded(
    wanted: list[Candidate], links: tuple[int, int], prefill: int, moves: int, at_once: dict[str, int]
) -> None:
    """Every move is divided or deferred exactly once, within every budget and allowed mode."""
    uplink, downlink = links
    rooms = {"a": uplink, "b": downlink, "c": downlink}, {"b": prefill, "c": prefill}
    division = divide(wanted, Budgets(*rooms, SECOND_US, moves, link_moves=at_once))
    assert len(division.transfers) <= at_once.get("a", moves)
    assert sum(transfer.move.target == "b" for transfer in division.transfers) <= at_once.get("b", moves)
    assert len(division.transfers) + len(division.deferred) == len(wanted)
    assert len(division.transfers) <= moves
    by_target: Counter[str] = Counter()
    recomputed: Counter[str] = Counter()
    for transfer in division.transfers:
        by_target[transfer.move.target] += transfer.copied_bytes
        recomputed[transfer.move.target] += transfer.recomputed_tokens
        assert transfer.copied_bytes == 10 * (transfer.move.size_blocks - transfer.recomputed_tokens)
        if transfer.mode is Mode.HYBRID:
            assert 0 < transfer.recomputed_tokens < transfer.move.size_blocks
    assert sum(by_target.values()) <= uplink
    assert max(by_target.values(), default=0) <= downlink
    assert max(recomputed.values(), default=0) <= prefill
    allowed = Counter((id(c.move), mode) for c in wanted for mode in c.modes)
    assert all(allowed[id(t.move), t.mode] for t in division.transfers)


def test_rates_follow_what_is_seen() -> None:
    """A boundary drifts towards observed rates and says what fits into a time."""
    rate = RateEstimate(1_000.0, 10_000.0, weight=0.5)
    rate.observe(amount=3_000, took_us=SECOND_US, now_us=SECOND_US)
    assert rate.budget(SECOND_US // 2, SECOND_US) == 1_000
    rate.observe(amount=0, took_us=5, now_us=2 * SECOND_US)
    assert (rate.per_s, rate.seen_us) == (2_000.0, SECOND_US)


def test_a_rate_that_looked_slow_is_tried_again_after_a_while() -> None:
    """Twice as much each minute without news, up to its ceiling; what is above that stays; one look ends the trust."""
    minute_us = 60 * SECOND_US
    rate = RateEstimate(10.0, 100.0, seen_us=SECOND_US, least=50)
    ages_us = (0, minute_us - 1, minute_us, 3 * minute_us, 4 * minute_us, 10**6 * minute_us)
    assert [rate.budget(SECOND_US, SECOND_US + age_us) for age_us in ages_us] == [10, 10, 20, 80, 100, 100]
    rate.observe(amount=50, took_us=5 * SECOND_US, now_us=5 * minute_us)
    assert rate.budget(SECOND_US, 5 * minute_us + 1) == 10
    assert RateEstimate(500.0, 100.0).budget(SECOND_US, 10 * minute_us) == 500


def test_prefill_rate_depends_on_the_batch() -> None:
    """Between measured batches the slower one counts; beyond the last there is no room."""
    profile = PrefillProfile(((1, 900.0), (8, 500.0)))
    assert [profile.rate_at(batch) for batch in (0, 1, 2, 8, 9)] == [900.0, 900.0, 500.0, 500.0, 0.0]
