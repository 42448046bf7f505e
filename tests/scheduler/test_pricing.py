"""Outcomes of moves on their way to those who tell others: each once, with its cost where that comes in time."""

from dataclasses import replace

from mell_scheduler.core import AskReport, MigrationPriced, MigrationSettled
from mell_scheduler.core.pricing import Pricing

SEEN = MigrationSettled("7-1", "s", "a", "b", "committed", "its target reports it")
TOLD = replace(SEEN, reason="", copied_bytes=4_096)
OTHER = AskReport(None)


def test_what_is_known_in_full_passes() -> None:
    """So does whatever is no outcome, in its order."""
    failed = replace(SEEN, outcome="failed", reason="no_room")
    assert Pricing(3).take([OTHER, TOLD, failed], 0) == [OTHER, TOLD, failed]


def test_an_outcome_without_its_cost_waits_for_it() -> None:
    """And is told once, with it."""
    pricing = Pricing(3)
    assert pricing.take([SEEN, OTHER], 0) == [OTHER]
    assert pricing.take([MigrationPriced(TOLD)], 2) == [TOLD]
    assert pricing.take([OTHER], 9) == [OTHER]
    assert pricing.end() == []


def test_it_is_told_without_when_the_news_does_not_come() -> None:
    """After its patience; news that come later still are not told again."""
    pricing = Pricing(3)
    pricing.take([SEEN], 0)
    assert pricing.take([], 2) == []
    assert pricing.take([MigrationPriced(TOLD)], 3) == [SEEN]
    assert pricing.take([MigrationPriced(TOLD)], 4) == []


def test_what_waits_is_told_at_the_end() -> None:
    """Of leadership: nobody here would hear the news."""
    pricing = Pricing(3)
    pricing.take([SEEN], 0)
    assert pricing.end() == [SEEN]
    assert pricing.end() == []
