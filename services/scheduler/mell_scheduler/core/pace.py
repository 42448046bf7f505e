"""How fast a line of waiting requests moves, while it has not been empty; whole numbers only, so that replays agree."""

_HALF_US = 15_000_000
_KNOWN_US = 2_000_000
"""Nothing is said of a line younger than this: it may be a burst that room is being made for right now."""
_KNOWN_PLACES = 4
"""Nor for its first 15 s by fewer places than this: those who began together may be about to end together."""


class Pace:
    """Counts who got a place out of one line, over the last 15 to 30 seconds; made anew when the line was empty.

    What happened while nobody waited says nothing of how fast a line can move, so it does not count.
    """

    __slots__ = ("_before", "_before_us", "_now", "_since_us")

    def __init__(self, now_us: int) -> None:
        self._since_us = now_us
        self._now = self._before = self._before_us = 0

    def add(self, now_us: int) -> None:
        """One got a place."""
        self._roll(now_us)
        self._now += 1

    def wait_us(self, length: int, now_us: int) -> int | None:
        """How long the last of so many will wait; None while too little is known.

        Where nobody got a place one is taken to be about to.
        """
        self._roll(now_us)
        span_us = self._before_us + now_us - self._since_us
        places = self._before + self._now
        if span_us < _KNOWN_US or (places < _KNOWN_PLACES and span_us < _HALF_US):
            return None
        return length * span_us // max(1, places)

    def _roll(self, now_us: int) -> None:
        halves = (now_us - self._since_us) // _HALF_US
        if halves:
            self._before = self._now if halves == 1 else 0
            self._now, self._before_us = 0, _HALF_US
            self._since_us += halves * _HALF_US
