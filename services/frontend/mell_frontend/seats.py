"""How many may do something at a time that lasts: whoever comes takes a seat at once, or is told that all are taken."""

from collections.abc import Iterator
from contextlib import contextmanager

from mell_frontend.errors import ApiError


class Seats:
    """Counts who is there. Looking and taking are one step, so that two who come together cannot both get the last."""

    def __init__(self, most: int, full: str) -> None:
        self._most = most
        self._full = full
        self._taken = 0

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Hold a seat; raises `ApiError` (503) with the words for a full house if there is none."""
        if self._taken >= self._most:
            raise ApiError(503, self._full, code="overloaded")
        self._taken += 1
        try:
            yield
        finally:
            self._taken -= 1
