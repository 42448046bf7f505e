"""Chance that repeats: every number is a hash of the seed and of what it decides.

So taking one fault out of a run leaves the fate of all messages that it does not touch as it was.
"""

from hashlib import blake2b

Key = str | int


class Chance:
    """Numbers by name, the same for the same seed and name."""

    def __init__(self, seed: int) -> None:
        self._salt = seed.to_bytes(8, "little", signed=True)

    def number(self, *name: Key) -> int:
        """Return 64 random bits."""
        text = "\0".join(map(str, name)).encode()
        return int.from_bytes(blake2b(text, digest_size=8, key=self._salt).digest(), "little")

    def share(self, *name: Key) -> float:
        """Return a number in [0, 1)."""
        return self.number(*name) / 2**64

    def happens(self, probability: float, *name: Key) -> bool:
        """Return whether something of this probability happens."""
        return probability > 0 and self.share(*name) < probability

    def between(self, low: int, high: int, *name: Key) -> int:
        """Return an integer in [low, high]."""
        return low + self.number(*name) % (high - low + 1)
