"""The half beside the memory of one rank: gives its blocks to others, and fetches theirs."""

import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from mell_vllm_connector.exchange import ExchangeError, Giver, take
from mell_vllm_connector.kv_memory import KvMemory
from mell_vllm_connector.scheduler_half import Load, StepOrders

log = logging.getLogger("vllm.mell")

_FETCHES = 4
"""At once."""


def rank_address(address: str, rank: int) -> str:
    """Return where a rank gives its part of each block: a port for each, from that of the server on."""
    host, _, port = address.rpartition(":")
    return f"{host}:{int(port) + rank}"


@dataclass(slots=True)
class WorkerHalf:
    """One rank's. Its server's address is where rank 0 gives."""

    address: str
    rank: int
    memory: KvMemory
    _giver: Giver = field(init=False)
    _pool: ThreadPoolExecutor = field(init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _finished: set[str] = field(default_factory=set)
    _failed: set[int] = field(default_factory=set)
    _told_failed: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._giver = Giver(rank_address(self.address, self.rank), self.memory)
        self._pool = ThreadPoolExecutor(_FETCHES, thread_name_prefix="mell-kv-fetch")

    def begin(self, orders: StepOrders) -> None:
        """A step is about to run."""
        self.memory.note()
        self._giver.change(orders.changes)

    def start(self, loads: list[Load]) -> None:
        """Begin to fetch; the blocks are known to be overwritten."""
        for load in loads:
            self._pool.submit(self._fetch, load)

    def _fetch(self, load: Load) -> None:
        done, begun_s = 0, time.monotonic()
        try:
            for content in take(rank_address(load.address, self.rank), load.digests, self.memory.block_bytes):
                self.memory.write(load.blocks[done : done + len(content)], content)
                done += len(content)
            log.debug("fetched %d KV blocks in %.3f s", done, time.monotonic() - begun_s)
        except ExchangeError as error:
            log.warning("fetched %d of %d KV blocks, the rest is computed: %s", done, len(load.blocks), error)
        except Exception:
            log.exception("fetched %d of %d KV blocks, the rest is computed", done, len(load.blocks))
        with self._lock:
            self._failed.update(load.blocks[done:])
            self._finished.add(load.request)

    def finished(self) -> set[str]:
        """Return the requests all of whose blocks were tried since the last time; `failed` then belongs to these."""
        with self._lock:
            finished, self._finished = self._finished, set()
            self._told_failed, self._failed = self._failed, set()
        return finished

    def failed(self) -> set[int]:
        """Return the blocks of the requests told last that could not be had."""
        failed, self._told_failed = self._told_failed, set()
        return failed

    def close(self) -> None:
        """Give and fetch nothing any more."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._giver.close()
