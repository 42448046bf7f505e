"""What operators order: drains, moves of single requests, no moves at all. Each ask gets one answer.

A move takes longer than an answer may: an ask that is not settled is answered as it stands after a while, and is asked
again under the same name. So the asker needs no patience of ours, and a lost answer costs nothing.
"""

from collections.abc import Sequence
from hashlib import blake2b

from mell_scheduler.core.drains import Drains
from mell_scheduler.core.ledger import Ledger
from mell_scheduler.core.lookup import find_sequences, find_worker, several_requests
from mell_scheduler.core.migrations import Migrations
from mell_scheduler.core.moves import Judge, as_status, result_of
from mell_scheduler.core.records import WorkerRecord
from mell_scheduler.core.values import (
    Answer,
    Command,
    CoreSettings,
    Handle,
    MigrationSettled,
    OperatorRequest,
    StartMigration,
)
from mell_scheduler.core.waiting import WaitingQueue
from mell_scheduler.policy.base import Policy
from mell_scheduler.policy.transfer import Mode
from mell_shared.messages.admin import (
    AdminRefused,
    DrainRequest,
    MigrateReply,
    MigrateRequest,
    MoveResult,
    MovingReply,
    MovingRequest,
    UndrainRequest,
)

_MOST_ASKS = 256
_REMEMBER_US = 120_000_000
_USED = AdminRefused(reason="invalid", message="this ask was used for something else already: use a new one")
_TOO_EARLY = AdminRefused(
    reason="not_ready",
    message="this scheduler has just begun to lead and may not know everybody yet: ask again in a moment",
)


class Ask:
    """An operator's order to move: what has become of each sequence, and who waits for it to be told."""

    __slots__ = ("forget_us", "handle", "hold_until_us", "request", "results", "target")

    def __init__(self, request: MigrateRequest, target: str, handle: Handle) -> None:
        self.request = request
        self.target = target
        self.results: dict[str, MoveResult] = {}
        self.handle: Handle | None = handle
        self.hold_until_us = 0
        self.forget_us = 0

    @property
    def settled(self) -> bool:
        """Whether every move has come out."""
        return all(result.state != "moving" for result in self.results.values())

    def answer(self) -> Answer:
        """Tell how it stands to who waits."""
        assert self.handle is not None, "somebody waits"
        handle, self.handle = self.handle, None
        return Answer(handle, MigrateReply(target=self.target, moves=tuple(self.results.values())))


class Operator:
    """Takes what operators ask; holds answers for at most `queue_hold_us`."""

    def __init__(
        self, ledger: Ledger, waiting: WaitingQueue, policy: Policy, migrations: Migrations, settings: CoreSettings
    ) -> None:
        self._ledger = ledger
        self._waiting = waiting
        self._migrations = migrations
        self._settings = settings
        self._drains = Drains(ledger, policy, migrations)
        self._judge = Judge(ledger)
        self._asks: dict[str, Ask] = {}

    def ask(self, handle: Handle, request: OperatorRequest, now_us: int, *, heard_all: bool) -> list[Command]:
        """Do what is asked, or say why not. Not `heard_all`: too early to move anything, or to know every worker."""
        match request:
            case DrainRequest() | UndrainRequest():
                worker = find_worker(self._ledger, request.worker)
                if not isinstance(worker, WorkerRecord):
                    return [Answer(handle, worker if heard_all else _TOO_EARLY)]
                return [self._drains.order(handle, request, worker)]
            case MovingRequest(paused=paused):
                self._migrations.paused = paused
                return [Answer(handle, MovingReply(paused=paused))]
            case MigrateRequest():
                return self._migrate(handle, request, now_us, heard_all=heard_all)

    def _migrate(self, handle: Handle, request: MigrateRequest, now_us: int, *, heard_all: bool) -> list[Command]:
        ask = self._asks.get(request.ask)
        if ask is not None and ask.request == request:
            if ask.handle == handle:
                return []  # the broker delivered it twice
            told: list[Command] = [ask.answer()] if ask.handle is not None else []
            ask.handle = handle
            return told + self._hold(ask, now_us)
        if ask is not None:
            return [Answer(handle, _USED)]
        begun = self._begin(handle, request, now_us) if heard_all else _TOO_EARLY
        return [Answer(handle, begun)] if isinstance(begun, AdminRefused) else begun

    def _begin(self, handle: Handle, request: MigrateRequest, now_us: int) -> list[Command] | AdminRefused:
        target = find_worker(self._ledger, request.target)
        if not isinstance(target, WorkerRecord):
            return target
        names = self._sequences(request.request)
        if isinstance(names, AdminRefused):
            return names
        if not self._has_room():
            return AdminRefused(reason="overloaded", message=f"{_MOST_ASKS} orders to move are under way: ask again")
        ask = Ask(request, target.worker_id, handle)
        orders: list[Command] = []
        for name in names:
            ask.results[name], order = self._move(name, target, request, now_us)
            orders += [order] if order is not None else []
        if all(result.state == "refused" for result in ask.results.values()):
            return _refused_as(next(iter(ask.results.values())))
        self._asks[request.ask] = ask
        return [*orders, *self._hold(ask, now_us)]

    def _has_room(self) -> bool:
        """Whether one more ask can be remembered, if need be in the place of the oldest that is over."""
        if len(self._asks) < _MOST_ASKS:
            return True
        over = next((name for name, ask in self._asks.items() if ask.settled), None)
        if over is not None:
            del self._asks[over]
        return over is not None

    def _sequences(self, name: str) -> list[str] | AdminRefused:
        """Those of a request that still run or wait; else why there is none."""
        known = find_sequences(self._ledger, self._waiting, name)
        if not known:
            text = f"no request {name!r} is known: give the id of its answer, its x-request-id, or a sequence's"
            return AdminRefused(reason="unknown_request", message=text)
        live = [n for n in known if n in self._ledger.sequences or self._waiting.get(n) is not None]
        if not live:
            return AdminRefused(reason="over", message=f"{name} has ended, or its worker holds it no more")
        several = several_requests(live)
        if several:
            text = f"{name!r} names {len(several)} requests: give one of {', '.join(several[:8])}"
            return AdminRefused(reason="ambiguous", message=text)
        return live

    def _move(
        self, name: str, target: WorkerRecord, request: MigrateRequest, now_us: int
    ) -> tuple[MoveResult, StartMigration | None]:
        """Begin one sequence's move, or say why there is none to begin."""
        verdict = self._judge.verdict(name, target, request.mode)
        if verdict is not None:
            return verdict, None
        record = self._ledger.sequences[name]
        mode = None if request.mode == "auto" else Mode(request.mode)
        order = self._migrations.order(record, target.worker_id, mode, now_us, name=_move_name(request.ask, name))
        if order is None:
            return self._judge.no_room(record, target), None
        assert record.migration is not None
        return MoveResult(sequence=name, state="moving", move=as_status(record.migration, now_us)), order

    # --- what becomes of them

    def settle(self, settled: Sequence[MigrationSettled]) -> list[Command]:
        """Moves have come out: tell whoever waits for them."""
        told: list[Command] = []
        for outcome in settled:
            for ask in self._asks.values():
                result = ask.results.get(outcome.sequence)
                if result is None or result.move is None or result.move.migration != outcome.migration:
                    continue
                ask.results[outcome.sequence] = result_of(outcome)
                if ask.settled and ask.handle is not None:
                    told.append(ask.answer())
        return told

    def passed(self, now_us: int) -> list[Command]:
        """Answer who has waited long enough, and forget what nobody asks for any more."""
        told: list[Command] = []
        for ask in list(self._asks.values()):
            if ask.handle is not None and now_us >= ask.hold_until_us:
                told.append(ask.answer())
            if now_us >= ask.forget_us:
                del self._asks[ask.request.ask]
        return told

    def ended(self) -> list[Command]:
        """This scheduler leads no more: whoever waits asks the next."""
        refused = AdminRefused(reason="not_leader", message="another scheduler leads now: ask again")
        held = [ask for ask in self._asks.values() if ask.handle is not None]
        self._asks.clear()
        return [Answer(ask.handle, refused) for ask in held if ask.handle is not None]

    def _hold(self, ask: Ask, now_us: int) -> list[Command]:
        ask.hold_until_us = now_us + self._settings.queue_hold_us
        ask.forget_us = now_us + _REMEMBER_US
        return [ask.answer()] if ask.settled else []


def _move_name(ask: str, sequence: str) -> str:
    """Name an operator's move so that the next leader, asked the same, gives the order for the very same move."""
    return f"ask-{blake2b(f'{ask} {sequence}'.encode(), digest_size=12).hexdigest()}"


def _refused_as(result: MoveResult) -> AdminRefused:
    return AdminRefused.model_validate({"reason": result.reason, "message": result.message})
