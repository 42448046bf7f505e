"""What happened to each sequence, for operators who ask: a bounded memory that decides nothing."""

from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Literal

from mell_scheduler.core.values import MigrationSettled

_MOST_PAGES = 32

What = Literal["placed", "found", "moving", "moved", "stayed", "gone"]


@dataclass(frozen=True, slots=True)
class Page:
    """One thing that happened, at `worker`; see `Happening` in `mell_shared.messages.admin`."""

    at_us: int
    what: What
    worker: str
    generation: int
    why: str = ""
    blocks: int = 0
    free_blocks: int = 0
    waited_us: int = 0
    migration: str = ""
    settled: MigrationSettled | None = None


class Chronicle:
    """A sequence's pages: the first, and the latest."""

    __slots__ = ("left_out", "model", "moves", "pages", "request_id", "sequence")

    def __init__(self, sequence: str) -> None:
        self.sequence = sequence
        self.request_id = ""
        self.model = ""
        self.moves = 0
        """Committed ones."""
        self.pages: list[Page] = []
        self.left_out = 0

    def add(self, page: Page) -> None:
        """Append; beyond the bound the second oldest goes."""
        if len(self.pages) == _MOST_PAGES:
            del self.pages[1]
            self.left_out += 1
        self.pages.append(page)


class History:
    """The chronicles of all sequences that are known, and of those that were, the latest `limit`."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._known: dict[str, Chronicle] = {}
        self._over: OrderedDict[str, Chronicle] = OrderedDict()

    def write(self, sequence: str, page: Page) -> Chronicle | None:
        """Add a page to a sequence that is known now; returns its chronicle, None if nothing is remembered at all."""
        if not self._limit:
            return None
        chronicle = self._known.get(sequence)
        if chronicle is None:
            over = self._over.pop(sequence) if sequence in self._over else None
            chronicle = self._known[sequence] = over or Chronicle(sequence)
        chronicle.add(page)
        return chronicle

    def amend(self, settled: MigrationSettled) -> None:
        """Replace what is known of how a move came out."""
        chronicle = self.get(settled.sequence)
        if chronicle is None:
            return
        for number, page in enumerate(chronicle.pages):
            if page.settled is not None and page.migration == settled.migration:
                chronicle.pages[number] = replace(page, settled=settled, why=settled.reason)

    def close(self, sequence: str, page: Page) -> None:
        """Add the page that says that a sequence is known no more; a newer generation may open it again."""
        chronicle = self._known.pop(sequence, None)
        if chronicle is None:
            return
        chronicle.add(page)
        self._over[sequence] = chronicle
        if len(self._over) > self._limit:
            self._over.popitem(last=False)

    def get(self, sequence: str) -> Chronicle | None:
        """The chronicle of a sequence, known now or lately."""
        return self._known.get(sequence) or self._over.get(sequence)

    def named(self, name: str) -> list[str]:
        """The sequences that go by a name: their own, their request's, or what its client calls that; oldest first."""
        found: dict[str, None] = {}
        for chronicles in (self._over, self._known):
            for sequence, chronicle in chronicles.items():
                if goes_by(sequence, name) or chronicle.request_id == name:
                    found[sequence] = None
        return list(found)


def goes_by(sequence: str, name: str) -> bool:
    """Whether a sequence has this id, or is one of this request's (`request.prompt.choice`)."""
    return sequence == name or sequence.startswith(f"{name}.")
