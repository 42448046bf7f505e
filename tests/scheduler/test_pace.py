from hypothesis import given
from hypothesis import strategies as st

from mell_scheduler.core.pace import Pace
from mell_shared.messages.scheduler import Rejected
from tests.scheduler.script import SECOND, Script
from tests.scheduler.test_core_queue import full_script, hold_up


def test_a_young_line_tells_nothing() -> None:
    """In its first two seconds a burst is let in, whatever has been served."""
    pace = Pace(0)
    for _ in range(4):
        pace.add(SECOND)
    assert pace.wait_us(1_000, 2 * SECOND - 1) is None
    assert pace.wait_us(40, 2 * SECOND) == 20 * SECOND


def test_few_places_tell_nothing_of_a_young_line() -> None:
    """Answers that began together end together: until then the line stands, and will not for long."""
    pace = Pace(0)
    for number in range(3):
        pace.add(number * SECOND)
    assert pace.wait_us(30, 15 * SECOND - 1) is None
    assert pace.wait_us(30, 15 * SECOND) == 150 * SECOND
    pace = Pace(0)
    assert pace.wait_us(30, 15 * SECOND - 1) is None
    assert pace.wait_us(30, 15 * SECOND) == 450 * SECOND


def test_the_wait_is_the_line_over_its_pace() -> None:
    """Four places a second serve forty in ten seconds; an old pace is forgotten."""
    pace = Pace(0)
    for quarter in range(400):
        pace.add(quarter * SECOND // 4)
    assert pace.wait_us(40, 100 * SECOND) == 10 * SECOND
    assert pace.wait_us(1, 145 * SECOND) == 25 * SECOND


@given(st.lists(st.integers(0, 20 * SECOND), max_size=40), st.integers(1, 1000))
def test_the_pace_is_of_the_last_half_minute(steps_us: list[int], length: int) -> None:
    """Whatever came when, the wait told is that of a pace counted over a stretch that ends now."""
    pace, now_us, added = Pace(0), 0, []
    for step_us in steps_us:
        now_us += step_us
        pace.add(now_us)
        added.append(now_us)
    wait_us = pace.wait_us(length, now_us)
    starts = [start for start in range(0, now_us + 1, 15 * SECOND) if now_us - start < 30 * SECOND]
    span_us = now_us - min(starts)
    places = sum(at_us >= min(starts) for at_us in added)
    known = span_us >= (2 if places >= 4 else 15) * SECOND
    assert wait_us == (length * span_us // max(1, places) if known else None)


def slow_script(**settings: int) -> Script:
    """A cluster without room, and six who wait."""
    script = full_script(queue_wait_us=10 * SECOND, queue_renew_us=100 * SECOND, **settings)
    for number in range(6):
        script.ask(f"s{number}", 1_500, 16)
    return script


def test_nobody_joins_a_line_that_would_not_be_served_soon() -> None:
    """Refused with the time that the line takes; those who wait already stay."""
    script = slow_script()
    hold_up(script, 15)
    reply = script.answer("late", 1_500, 16)
    assert isinstance(reply, Rejected)
    assert (reply.reason, reply.retry_after_s) == ("queue_full", 60.0)
    assert "about 105 s, over the limit of 10" in reply.message
    assert len(script.core.waiting) == 6
    assert script.answer("s0", 1_500, 16, waited_s=15.0) is None


def test_the_more_urgent_joins_in_the_last_one_s_stead() -> None:
    """As with a full queue, the last in order goes."""
    script = slow_script()
    hold_up(script, 15)
    script.ask("urgent", 1_500, 16, priority=1)
    assert script.core.waiting.get("urgent") is not None
    assert script.core.waiting.get("s5") is None
    assert isinstance(script.answer("s5", 1_500, 16, waited_s=15.0), Rejected)


def test_without_the_limit_only_the_number_counts() -> None:
    """0 switches it off."""
    script = full_script(queue_wait_us=0, queue_renew_us=100 * SECOND)
    for number in range(50):
        script.ask(f"s{number}", 1_500, 16)
    hold_up(script, 15)
    assert script.answer("late", 1_500, 16) is None
