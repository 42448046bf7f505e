"""The half in a server's scheduler: what a request can have from elsewhere, and which blocks hold what."""

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mell_vllm_connector.content import Book, Changes, extend_digests, root_digest
from mell_vllm_connector.exchange import ExchangeError

log = logging.getLogger("vllm.mell")

PARAMETERS = "mell"
"""Key of this connector's part of `kv_transfer_params`, in requests and answers."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a server tells of itself. `layout` is a digest of all that makes KV interchangeable."""

    address: str
    layout: str
    block_tokens: int
    block_bytes: int


class Load(NamedTuple):
    """Blocks to be fetched for a request that waits for them."""

    request: str
    address: str
    digests: list[bytes]
    blocks: list[int]


@dataclass(slots=True)
class StepOrders:
    """What the half at the memory is told with each step."""

    changes: Changes
    loads: list[Load]


@dataclass(slots=True)
class _Visit:
    """A request that may have KV from another server."""

    address: str
    first: int
    """The first block that is asked for."""
    digests: list[bytes]
    held: "Future[int]"
    load: Load | None = None
    failed: set[int] = field(default_factory=set)
    """Blocks of the load that some rank could not get."""
    outdated: bool = False
    """What is being loaded must not be given to anybody: it was computed before a reset."""
    begun_s: float = 0.0
    fetched_blocks: int = 0
    took_us: int = 0
    done: bool = False


@dataclass(slots=True)
class SchedulerHalf:
    """One server's. `ask` asks another server how many of the first of these blocks it has, without waiting."""

    facts: Facts
    ask: Callable[[str, Sequence[bytes]], "Future[int]"]
    _visits: dict[str, _Visit] = field(default_factory=dict)
    _loads: list[Load] = field(default_factory=list)
    _root: bytes = b""
    _book: Book = field(init=False)

    def __post_init__(self) -> None:
        self._root = root_digest(self.facts.layout)
        self._book = Book(self._root, self.facts.block_tokens)

    def matched(self, request: Any, computed: int) -> tuple[int | None, bool]:
        """Return how many tokens beyond `computed` can be had, None if that is not known yet; and whether to wait."""
        visit = self._visits.get(request.request_id)
        if visit is None:
            visit = self._visit(request, computed)
        if visit is None or visit.done:
            return 0, False
        if not visit.held.done():
            return None, False
        end = visit.first + _held(visit)
        tokens = max(0, end * self.facts.block_tokens - computed)
        visit.done = not tokens
        return tokens, tokens > 0

    def _visit(self, request: Any, computed: int) -> _Visit | None:
        address = _parameters(request).get("from")
        size = self.facts.block_tokens
        first, whole = computed // size, len(request.all_token_ids) // size
        if not isinstance(address, str) or not address or whole <= first or not _is_plain(request):
            return None
        digests: list[bytes] = []
        extend_digests(digests, self._root, request.all_token_ids, whole, size)
        visit = _Visit(address, first, digests, self.ask(address, digests[first:]))
        self._visits[request.request_id] = visit
        return visit

    def allocated(self, request: Any, blocks: Sequence[int], tokens: int) -> None:
        """A request has got blocks, of which `tokens` tokens' are to be fetched, as `matched` said."""
        visit = self._visits.get(request.request_id)
        if _is_plain(request) and not (visit and visit.outdated):
            self._book.know(request.request_id, request.all_token_ids)
        if visit is None or visit.done or not tokens:
            return
        size = self.facts.block_tokens
        end = visit.first + _held(visit)
        first = end - tokens // size
        visit.load = Load(request.request_id, visit.address, visit.digests[first:end], list(blocks[first:end]))
        visit.begun_s, visit.done = time.monotonic(), True
        self._loads.append(visit.load)
        self._book.load(request.request_id, visit.load.blocks)

    def step(self, output: Any) -> StepOrders:
        """Return what goes with a step that has been planned."""
        for new in output.scheduled_new_reqs:
            self._book.begin(new.req_id, new.block_ids[0], new.num_computed_tokens)
        old = output.scheduled_cached_reqs
        for request, fresh, computed in zip(old.req_ids, old.new_block_ids, old.num_computed_tokens, strict=True):
            blocks = fresh[0] if fresh else ()
            follow = self._book.begin if request in old.resumed_req_ids else self._book.go_on
            follow(request, blocks, computed)
        loads, self._loads = self._loads, []
        return StepOrders(self._book.take(), loads)

    def received(self, finished: set[str], failed_blocks: set[int]) -> None:
        """What was fetched for these requests is in place, but for the blocks that failed.

        A rank tells of its failures when it has done its part, perhaps steps before the last rank has.
        """
        for request, visit in self._visits.items():
            if visit.load is None or visit.took_us:
                continue
            blocks = visit.load.blocks
            visit.failed |= failed_blocks.intersection(blocks)
            if request in finished:
                failed = (at for at, block in enumerate(blocks) if block in visit.failed)
                visit.fetched_blocks = next(failed, len(blocks))
                visit.took_us = max(1, round((time.monotonic() - visit.begun_s) * 1e6))

    @property
    def urgent(self) -> bool:
        """Whether the other half must hear something even if there is no step to plan."""
        return self._book.reset_pending

    def reset(self) -> None:
        """The server's prefix cache was emptied, since its weights have changed, say: nothing of before is given."""
        self._book.reset()
        for visit in self._visits.values():
            visit.outdated = visit.load is not None

    def finished(self, request: Any) -> dict[str, Any] | None:
        """A request has ended: return what its answer says of this connector, if it was asked for."""
        self._book.end(request.request_id, request.num_computed_tokens)
        visit = self._visits.pop(request.request_id, None)
        if visit is not None:
            visit.held.cancel()
        if PARAMETERS not in (request.kv_transfer_params or {}):
            return None
        facts = self.facts
        told: dict[str, Any] = {
            "address": facts.address,
            "layout": facts.layout,
            "block_tokens": facts.block_tokens,
            "block_bytes": facts.block_bytes,
        }
        if visit is not None:
            told["fetched_tokens"] = visit.fetched_blocks * facts.block_tokens
            told["fetched_bytes"] = visit.fetched_blocks * facts.block_bytes
            told["fetch_us"] = visit.took_us
        return {PARAMETERS: told}


def _held(visit: _Visit) -> int:
    """Return how many blocks the other server has; none if it does not say, which must not end this one."""
    try:
        return visit.held.result()
    except ExchangeError as error:
        log.warning("nothing fetched: %s", error)
    except Exception:
        log.exception("nothing fetched from %s", visit.address)
    return 0


def _parameters(request: Any) -> dict[str, Any]:
    said = (request.kv_transfer_params or {}).get(PARAMETERS)
    return said if isinstance(said, dict) else {}


def _is_plain(request: Any) -> bool:
    """Whether its KV depends on its token ids alone, and these only ever grow."""
    return not (
        request.lora_request
        or request.mm_features
        or request.prompt_embeds is not None
        or request.cache_salt
        or request.pooling_params
        or getattr(request, "resumable", False)
    )
