"""How many workers each model should have up: those in use, and room for what waits and for what outgrows them."""

from collections import Counter

from mell_scheduler.core.ledger import Ledger
from mell_scheduler.core.values import Command, WantGpus
from mell_scheduler.core.waiting import WaitingQueue
from mell_scheduler.policy.base import Policy


class Scaling:
    """Tells a model's wish when it changes."""

    def __init__(self, ledger: Ledger, waiting: WaitingQueue, policy: Policy) -> None:
        self._ledger = ledger
        self._waiting = waiting
        self._policy = policy
        self.wanted: dict[str, int] = {}
        """As told last."""

    def review(self) -> list[Command]:
        """Count anew; returns what changed."""
        wanted = {
            name: self.gpus_wanted(name, self._queued_tokens(name) + self._overflow_tokens(name))
            for name in self._ledger.models
        }
        changed = [WantGpus(name, gpus) for name, gpus in wanted.items() if self.wanted.get(name, 0) != gpus]
        gone = [WantGpus(name, 0) for name, gpus in self.wanted.items() if name not in wanted and gpus]
        self.wanted = wanted
        return [*changed, *gone]

    def gpus_wanted(self, name: str, queued_tokens: int) -> int:
        """Workers in use in all of a model's pools; for what is queued more, of the pool known longest."""
        total = 0
        for pool, block_tokens in self._ledger.models[name].pools.items():
            total += self._policy.gpus_wanted(pool, -(-queued_tokens // block_tokens))
            queued_tokens = 0
        return total

    def _queued_tokens(self, name: str) -> int:
        return sum(self._ledger.predicted_tokens(entry.request) for entry in self._waiting.of(name))

    def _overflow_tokens(self, name: str) -> int:
        """What workers are predicted to lack, preempted sequences included, once what is leaving them has left."""
        leaving: Counter[str] = Counter()
        for record in self._ledger.moving.values():
            leaving[record.worker.worker_id] += record.size_blocks
        tokens = 0
        for worker_id, worker in self._ledger.models[name].workers.items():
            lacking = -self._ledger.free_blocks(worker) - leaving[worker_id]
            if worker.usable and lacking > 0:
                tokens += lacking * worker.block_tokens
        return tokens
