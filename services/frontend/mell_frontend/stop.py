"""Finds stop strings in a growing text, across the borders of its pieces; pure."""

from collections.abc import Sequence


class StopMatcher:
    """Watches one text for the first stop string to be completed.

    What could still become a stop string is held back. The text ends before the stop string that is complete
    first; of several complete at the same character, before the longest. So the result does not depend on how
    the text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "an empty stop string would stop everything"
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Return the part of the text so far that is safe to show; `stopped` says whether it ends here."""
        assert not self.stopped, "the text has ended"
        if not text:
            return ""
        text = self._held + text
        start = self._first_match(text)
        if start is not None:
            self.stopped = True
            self._held = ""
            return text[:start]
        safe = len(text) - self._open_chars(text)
        self._held = text[safe:]
        return text[:safe]

    def flush(self) -> str:
        """Return what was held back; the text has ended by itself."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str) -> int | None:
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        return min(found)[1] if found else None

    def _open_chars(self, text: str) -> int:
        """Return the length of the longest end of `text` that begins a stop string."""
        return max(_open_chars(text, stop) for stop in self._stops)


def _open_chars(text: str, stop: str) -> int:
    start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while start >= 0:
        if stop.startswith(text[start:]):
            return len(text) - start
        start = text.find(stop[0], start + 1)
    return 0
