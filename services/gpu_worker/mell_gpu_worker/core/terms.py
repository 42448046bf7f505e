"""The terms of the schedulers that give orders here: only the newest leader known is obeyed."""


class Terms:
    """Remembers the highest term heard of. Every order that carries a term is shown to `admits` first."""

    def __init__(self) -> None:
        self.highest = 0

    def admits(self, term: int) -> bool:
        """Whether an order of this term is to be obeyed; takes note of it if so."""
        if term < self.highest:
            return False
        self.highest = term
        return True

    def refusal(self, term: int) -> str:
        """Say why an order of an older term is refused."""
        return f"an order of term {term}; this worker knows term {self.highest}"
