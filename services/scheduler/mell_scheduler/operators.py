"""What operators ask of the scheduler that leads: questions are answered here, orders go on to its core as events."""

from collections.abc import Awaitable, Callable

import structlog

from mell_scheduler.core import OperatorAsked, SchedulerCore
from mell_scheduler.core.explain import explain
from mell_scheduler.core.moves import outcome_status
from mell_scheduler.core.status import MOST_SEQUENCES, live_columns, move_statuses, sequence_statuses, worker_statuses
from mell_scheduler.metrics import Tally
from mell_scheduler.settings import SchedulerSettings
from mell_shared.clock import Clock
from mell_shared.messages.admin import (
    AdminRefused,
    AdminRequest,
    ExplainRequest,
    FailureCount,
    Live,
    LiveRequest,
    ModelStatus,
    Status,
    StatusRequest,
)
from mell_shared.messages.base import Message

_NOT_LEADER = AdminRefused(reason="not_leader", message="this scheduler does not lead: ask again in a moment")
_UNREADABLE = AdminRefused(reason="invalid", message="the scheduler cannot read this: is it of another release?")


class Operators:
    """Answers operators by `send`, and hands what would change something to the core by `put`."""

    def __init__(  # noqa: PLR0913 - what an answer is made of, and its two ways out
        self,
        settings: SchedulerSettings,
        process: str,
        clock: Clock,
        tally: Tally,
        *,
        send: Callable[[str, Message], Awaitable[None]],
        put: Callable[[OperatorAsked], Awaitable[None]],
    ) -> None:
        self._settings = settings
        self._process = process
        self._clock = clock
        self._started_us = clock.now_us()
        self._tally = tally
        self._send = send
        self._put = put
        self._log = structlog.get_logger()

    async def take(self, request: AdminRequest | None, reply_to: str, core: SchedulerCore | None) -> None:
        """Answer or hand on a request. None for it: it cannot be read; for the core: this scheduler does not lead."""
        if request is None:
            if reply_to:
                await self._send(reply_to, _UNREADABLE)
        elif core is None:
            await self.turn_away(reply_to)
        elif isinstance(request, StatusRequest):
            await self._send(reply_to, self._status(core, sequences=request.sequences))
        elif isinstance(request, LiveRequest):
            await self._send(reply_to, self._live(core))
        elif isinstance(request, ExplainRequest):
            await self._send(reply_to, explain(core, request.request, self._clock.now_us()))
        else:
            self._log.info("operator", **request.model_dump())
            await self._put(OperatorAsked(reply_to, request))

    async def turn_away(self, reply_to: str) -> None:
        """Say that this scheduler does not lead."""
        await self._send(reply_to, _NOT_LEADER)

    def _live(self, core: SchedulerCore) -> Live:
        known = len(core.ledger.sequences) + len(core.waiting)
        left_out = {"sequences_left_out": max(0, known - MOST_SEQUENCES)}
        # What is made here needs no validation, which would take as long as all the rest.
        return Live.model_construct(
            status=self._status(core, sequences=False).model_copy(update=left_out),
            sample_s=self._settings.epoch_s,
            used_lately=list(core.usage.used_lately),
            shadow_lately=list(core.usage.shadow_lately),
            **live_columns(core),
        )

    def _status(self, core: SchedulerCore, *, sequences: bool) -> Status:
        now_us = self._clock.now_us()
        rows = sequence_statuses(core) if sequences else ()
        return Status(
            scheduler=self._process,
            policy=self._settings.policy,
            uptime_s=(now_us - self._started_us) / 1_000_000,
            workers=worker_statuses(core, now_us),
            queued=len(core.waiting),
            placed=self._tally.placed,
            rejected=self._tally.rejected.total(),
            migrating=len(core.ledger.moving),
            migrated=self._tally.moves_settled["committed"],
            migrations_failed=self._tally.moves_settled["failed"] + self._tally.moves_settled["timeout"],
            models=tuple(ModelStatus(model=name, gpus_wanted=gpus) for name, gpus in core.scaling.wanted.items()),
            settled=now_us >= core.heard_all_us,
            moves_paused=core.moves_paused,
            moves=move_statuses(core, now_us),
            recent_moves=tuple(outcome_status(move, now_us - at_us) for at_us, move in self._tally.recent_moves),
            failures=tuple(
                FailureCount(reason=reason, count=count) for reason, count in sorted(self._tally.moves_failed.items())
            ),
            sequences=rows[:MOST_SEQUENCES],
            sequences_left_out=max(0, len(rows) - MOST_SEQUENCES),
            gpu_use=core.usage.told(now_us),
        )
