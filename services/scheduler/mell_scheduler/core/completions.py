"""How many sequences ended lately, to tell a rejected client when to come back."""

_WINDOW_S = 30
_SECOND_US = 1_000_000
_LEAST_S, _MOST_S = 1, 60


class Completions:
    """Counts per second over the last half minute; whole numbers only, so that replays agree."""

    def __init__(self) -> None:
        self._counts = [0] * _WINDOW_S
        self._second = 0
        self._first_second: int | None = None

    def add(self, now_us: int) -> None:
        """One sequence ended."""
        self._roll(now_us // _SECOND_US)
        self._counts[self._second % _WINDOW_S] += 1

    def _roll(self, second: int) -> None:
        if self._first_second is None:
            self._first_second = self._second = second
        for passed in range(max(self._second + 1, second - _WINDOW_S + 1), second + 1):
            self._counts[passed % _WINDOW_S] = 0
        self._second = max(self._second, second)

    def retry_after_s(self, queued: int, now_us: int) -> float:
        """When a queue of this length should have been served at the recent rate: 1 to 60 seconds."""
        self._roll(now_us // _SECOND_US)
        assert self._first_second is not None
        ended = sum(self._counts)
        if ended == 0:
            return float(_WINDOW_S)
        span_s = min(_WINDOW_S, self._second - self._first_second + 1)
        return float(min(_MOST_S, max(_LEAST_S, -(-queued * span_s // ended))))
