"""When to try again what has failed: delays that double."""

_FIRST_US = 5_000_000
_LONGEST_US = 300_000_000


class Retry:
    """Counts failures in a row."""

    def __init__(self, first_us: int = _FIRST_US, longest_us: int = _LONGEST_US) -> None:
        self._first_us = first_us
        self._longest_us = longest_us
        self._delay_us = 0
        self._due_us: int | None = None

    def due(self, now_us: int) -> bool:
        """Whether it may be tried now."""
        return self._due_us is None or now_us >= self._due_us

    def failed(self, now_us: int) -> int:
        """It was tried and has failed; returns the delay before the next try."""
        self._delay_us = min(2 * self._delay_us or self._first_us, self._longest_us)
        self._due_us = now_us + self._delay_us
        return self._delay_us

    def reset(self) -> None:
        """It went well."""
        self._delay_us, self._due_us = 0, None
