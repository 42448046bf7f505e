"""The two boundaries of adaptive transfer (MELL §V) for each worker: what its link carries, what it can prefill.

As the worker says, else as set; then kept current from what moves really took. Between two workers the lane itself is
a third limit, once they have measured it: a slow path between two fast workers.
"""

from collections.abc import Sequence
from math import inf

from mell_scheduler.core.ledger import Ledger
from mell_scheduler.core.values import CoreSettings
from mell_scheduler.policy.transfer import Budgets, Candidate, LinkId, PrefillProfile, RateEstimate
from mell_shared.messages.scheduler import LaneMeasured, MigrationCommitted

_LEAST_BYTES = 1 << 19
_LEAST_TOKENS = 32
"""Smaller moves say nothing of a rate: what they take is the latency of their messages."""


def link_out(worker: str) -> LinkId:
    """What a worker sends."""
    return f"{worker} out"


def link_in(worker: str) -> LinkId:
    """What a worker receives."""
    return f"{worker} in"


def lane_between(source: str, target: str) -> LinkId:
    """The way from one worker to another."""
    return f"{source} to {target}"


class Boundaries:
    """Rates of links and prefill, and what is left of them beside the moves under way."""

    def __init__(self, ledger: Ledger, settings: CoreSettings) -> None:
        self._ledger = ledger
        self._settings = settings
        self._links: dict[LinkId, RateEstimate] = {}
        self._lanes: dict[LinkId, RateEstimate] = {}
        """Between two workers, measured by them."""
        self._lane_ends: dict[LinkId, tuple[str, str]] = {}
        self._prefill: dict[tuple[str, int], RateEstimate] = {}
        """By worker and number of decodes: the next greater one it has measured, 0 where it has not."""

    def links(self, source: str, target: str) -> tuple[LinkId, ...]:
        """All that KV between two workers crosses, as far as its speed is known."""
        lane = lane_between(source, target)
        ends = (link_out(source), link_in(target))
        return (*ends, lane) if lane in self._lanes else ends

    def measured(self, event: LaneMeasured) -> None:
        """Learn what the lane between two workers carries; nothing of workers that are not known."""
        workers = self._ledger.workers
        if event.worker in workers and event.target in workers:
            lane = lane_between(event.worker, event.target)
            # Its ends, which count as well, are ceiling enough.
            self._lanes[lane] = self._estimate(float(event.bytes_per_s), inf, _LEAST_BYTES)
            self._lane_ends[lane] = (event.worker, event.target)
            self._forget_gone()

    def budgets(self, candidates: Sequence[Candidate], block_tokens: int, *, beside_moving: bool = True) -> Budgets:
        """What these moves may use: of each link and target what the moves under way leave, and the epoch's limits.

        Not `beside_moving`: as if nothing else were under way.
        """
        limit_us, now_us = self._settings.transfer_limit_us, self._ledger.now_us
        link_bytes: dict[LinkId, int] = {}
        prefill_tokens: dict[str, int] = {}
        link_moves: dict[LinkId, int] = {}
        for source, target in {(c.move.source, c.move.target): None for c in candidates}:
            # More would only be refused as busy.
            if outgoing := self._ledger.workers[source].spec.max_outgoing_moves:
                link_moves[link_out(source)] = outgoing
            if incoming := self._ledger.workers[target].spec.max_incoming_moves:
                link_moves[link_in(target)] = incoming
            link_bytes[link_out(source)] = self._link(link_out(source), source).budget(limit_us, now_us)
            link_bytes[link_in(target)] = self._link(link_in(target), target).budget(limit_us, now_us)
            lane = lane_between(source, target)
            if lane in self._lanes:
                link_bytes[lane] = self._lanes[lane].budget(limit_us, now_us)
            prefill_tokens[target] = self._prefill_of(target).budget(limit_us, now_us)
        if beside_moving:
            self._subtract_moving(link_bytes, link_moves, prefill_tokens)
        return Budgets(
            link_bytes=link_bytes,
            prefill_tokens=prefill_tokens,
            limit_us=limit_us,
            max_moves=self._settings.max_moves_per_epoch,
            max_bytes=self._settings.max_move_bytes_per_epoch,
            block_tokens=block_tokens,
            link_moves=link_moves,
        )

    def _subtract_moving(
        self, link_bytes: dict[LinkId, int], link_moves: dict[LinkId, int], prefill_tokens: dict[str, int]
    ) -> None:
        for record in self._ledger.moving.values():
            assert record.migration is not None
            transfer = record.migration.transfer
            for link in self.links(record.migration.source, record.migration.target):
                if link in link_bytes:
                    link_bytes[link] = max(0, link_bytes[link] - transfer.copied_bytes)
                if link in link_moves:
                    link_moves[link] -= 1
            target = record.migration.target
            if target in prefill_tokens:
                prefill_tokens[target] = max(0, prefill_tokens[target] - transfer.recomputed_tokens)

    def observe(self, done: MigrationCommitted) -> None:
        """Learn from a move what it really took, as far as it says."""
        now_us = self._ledger.now_us
        for link, worker in ((link_out(done.source), done.source), (link_in(done.worker), done.worker)):
            if worker in self._ledger.workers:
                self._link(link, worker).observe(done.copied_bytes, done.copy_us, now_us)
        lane = self._lanes.get(lane_between(done.source, done.worker))
        if lane is not None:
            lane.observe(done.copied_bytes, done.copy_us, now_us)
        self._prefill_of(done.worker).observe(done.prefilled_tokens, done.prefill_us, now_us)
        self._forget_gone()

    def _link(self, link: LinkId, worker: str) -> RateEstimate:
        if link not in self._links:
            said = float(self._ledger.workers[worker].spec.link_bytes_per_s or self._settings.link_bytes_per_s)
            self._links[link] = self._estimate(said, said, _LEAST_BYTES)
        return self._links[link]

    def _prefill_of(self, worker: str) -> RateEstimate:
        record = self._ledger.workers[worker]
        spec = record.spec
        profile = PrefillProfile(tuple(zip(spec.profiled_batches, spec.profiled_tokens_per_s, strict=True)))
        batch = profile.batch_at(record.running)
        if (worker, batch) not in self._prefill:
            # Beside more decodes than were measured it is at most what it was beside the most.
            last = profile.tokens_per_s[-1][1] if profile.tokens_per_s else spec.prefill_tokens_per_s
            said = float(profile.rate_at(record.running) or last or self._settings.prefill_tokens_per_s)
            self._prefill[worker, batch] = self._estimate(said, said, _LEAST_TOKENS)
        return self._prefill[worker, batch]

    def _estimate(self, per_s: float, ceiling_per_s: float, least: int) -> RateEstimate:
        return RateEstimate(per_s, ceiling_per_s, self._ledger.now_us, least=least)

    def _forget_gone(self) -> None:
        """Keep nothing of workers that are gone; only looked at when much more is kept than there are workers."""
        workers = self._ledger.workers
        if len(self._links) > 2 * len(workers) + 64:
            self._links = {link: rate for link, rate in self._links.items() if link.rpartition(" ")[0] in workers}
            self._prefill = {at: rate for at, rate in self._prefill.items() if at[0] in workers}
        if len(self._lanes) > 32 * len(workers) + 64:
            gone = [lane for lane, ends in self._lane_ends.items() if not workers.keys() >= set(ends)]
            for lane in gone:
                del self._lanes[lane], self._lane_ends[lane]
