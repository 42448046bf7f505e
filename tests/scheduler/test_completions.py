from mell_scheduler.core.completions import Completions

SECOND = 1_000_000


def test_without_ends_one_waits_half_a_minute() -> None:
    """Nothing is known of the rate."""
    assert Completions().retry_after_s(5, 0) == 30.0


def test_the_wait_is_the_queue_over_the_rate() -> None:
    """Ten ends a second serve a queue of fifty in five."""
    completions = Completions()
    for tenth in range(100):
        completions.add(tenth * SECOND // 10)
    assert completions.retry_after_s(50, 10 * SECOND - 1) == 5.0


def test_the_wait_is_bounded() -> None:
    """At least a second, at most a minute."""
    completions = Completions()
    completions.add(0)
    assert completions.retry_after_s(1, 0) == 1.0
    assert completions.retry_after_s(1_000_000, 0) == 60.0


def test_old_ends_are_forgotten() -> None:
    """Only the last half minute counts, also after a long silence."""
    completions = Completions()
    for _ in range(100):
        completions.add(0)
    assert completions.retry_after_s(30, 29 * SECOND) == 9.0
    assert completions.retry_after_s(30, 30 * SECOND) == 30.0
    assert completions.retry_after_s(30, 10_000 * SECOND) == 30.0
