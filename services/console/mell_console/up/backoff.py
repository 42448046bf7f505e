"""How long to wait before a dead process is started again: pure."""

FIRST_DELAY_US = 500_000
LONGEST_DELAY_US = 30_000_000
HEALTHY_US = 60_000_000
"""A process that ran this long was well; its death counts as the first again."""


def next_delay_us(previous_us: int, ran_us: int) -> int:
    """Return the delay after a death, from the delay before that start (0: none) and how long the process then ran."""
    if previous_us == 0 or ran_us >= HEALTHY_US:
        return FIRST_DELAY_US
    return min(2 * previous_us, LONGEST_DELAY_US)
