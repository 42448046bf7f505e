"""A scheduler process: the real lease, and while it leads the real core."""

from typing import assert_never

from mell_scheduler.core import (
    Announce,
    AskReport,
    Command,
    ConnectionRestored,
    Event,
    LeadershipEnded,
    LeadershipTaken,
    MigrationPriced,
    MigrationSettled,
    PlaceRequested,
    Reply,
    SchedulerCore,
    StartMigration,
    Tick,
    WantGpus,
)
from mell_scheduler.lease import Lease, LeaseCommand, LeaseEvent, LeaseSettings, Look, Unanswered
from mell_scheduler.policy import make_policy
from mell_scheduler.settings import SchedulerSettings
from mell_shared.messages.base import Message
from mell_shared.messages.scheduler import PLACE_REQUEST, SCHEDULER_EVENT, MigrationFailed, PlaceRequest, SchedulerEvent
from mell_shared.messages.worker import WORKER_REPLY, Drain, Migrate, MigrateAccepted, MigrateRefused, Report, Undrain
from mell_shared.subjects import Subjects
from tests.cluster.simulation.clock import LocalClock
from tests.cluster.simulation.process import Process
from tests.cluster.simulation.surroundings import Surroundings

TICK_US = 100_000
_STORE_US = 2_000
_UNIX_MS = 1_700_000_000_000


class SchedulerProcess(Process):
    """One incarnation of a scheduler. `stubborn`: it goes on as leader whatever becomes of its lease."""

    def __init__(
        self, node: str, name: str, clock: LocalClock, around: Surroundings, settings: SchedulerSettings
    ) -> None:
        super().__init__(node, name, clock)
        self.network = around.network
        self.judge = around.judge
        self.core: SchedulerCore | None = None
        self.stubborn = False
        self.term = 0
        self._store = around.store
        self._settings = settings
        self._lease = Lease(name, LeaseSettings())
        self._led_term: int | None = None
        self._subjects = Subjects()

    def start(self) -> None:
        """Join the broker and stand for leader."""
        self.network.connect(self)
        self._stand(Look(self.clock.now_us()))
        self.every(TICK_US, lambda: self.handle(Tick()), after_standstill=self.connection_restored)

    @property
    def leads(self) -> bool:
        """Whether it may decide, as far as it knows."""
        return self._lease.leads(self.clock.now_us()) or (self.stubborn and self.core is not None)

    def drain(self, worker: str, deadline_s: float | None, *, over: bool) -> None:
        """Carry out an operator's order: drain a worker, or take it back when it is `over`."""
        order: Message = Undrain(term=self.term) if over else Drain(term=self.term, deadline_s=deadline_s)
        self._send(self._subjects.worker_commands(worker), order)

    def shove(self, worker: str, order: Migrate) -> None:
        """Order a move behind the core's back."""
        self.network.request(
            self,
            self._subjects.worker_commands(worker),
            order,
            replies=WORKER_REPLY,
            timeout_us=1,
            answered=lambda _: None,
        )

    def connection_restored(self) -> None:
        """The connection to the broker is up again."""
        self.handle(ConnectionRestored())

    # --- the lease

    def _stand(self, command: LeaseCommand) -> None:
        self.after(command.at_us - self.clock.now_us(), lambda: self._ask_store(command))

    def _ask_store(self, command: LeaseCommand) -> None:
        sent_us = self.clock.now_us()
        if not self.network.connected(self) or self.stubborn:
            self.after(1_000_000, lambda: self._heard_of_lease(Unanswered()))
            return
        event = self._store.carry_out(command, sent_us)
        self.after(_STORE_US, lambda: self._heard_of_lease(event))

    def _heard_of_lease(self, event: LeaseEvent) -> None:
        now_us = self.clock.now_us()
        self._stand(self._lease.handle(event, now_us, _UNIX_MS + self.queue.now_us // 1_000))
        self._follow_lease()

    def _follow_lease(self) -> None:
        self._lease.lapse(self.clock.now_us())
        held = self._lease.held
        term = held.value.term if held else None
        if term == self._led_term or self.stubborn:
            return
        if self.core is not None:
            self.handle(LeadershipEnded())
        self._led_term = term
        if term is not None:
            self.term = term
            self._begin(term)

    def _begin(self, term: int) -> None:
        policy = make_policy(self._settings.policy, self._settings.policy_settings())
        self.core = SchedulerCore(policy, self._settings.core_settings(), self.clock.now_us())
        self.network.listen(self, self._subjects.place, PLACE_REQUEST, self._asked)
        self.network.listen(self, self._subjects.scheduler_events, SCHEDULER_EVENT, self._told)
        self.handle(LeadershipTaken(term))

    # --- events

    def _asked(self, request: PlaceRequest, reply_to: str) -> None:
        self.handle(PlaceRequested(reply_to, request))

    def _told(self, event: SchedulerEvent, reply_to: str) -> None:
        self.handle(event)

    def handle(self, event: Event) -> None:
        """Give the core an event, if it may decide now, and do what it wants."""
        if isinstance(event, Tick):
            self._follow_lease()
        if self.core is None or not self._may_decide(event):
            return
        commands = self.core.handle(event, self.clock.now_us())
        self.judge.saw(self.name, event, commands)
        self.core.check()
        for command in commands:
            self._perform(command)
        if isinstance(event, LeadershipEnded):
            self.core = None
            self.network.ignore(self, self._subjects.place)
            self.network.ignore(self, self._subjects.scheduler_events)

    def _may_decide(self, event: Event) -> bool:
        if isinstance(event, LeadershipEnded):
            return True
        return self.leads and (self.network.connected(self) or not isinstance(event, Tick))

    def _perform(self, command: Command) -> None:
        match command:
            case Reply(handle, _, reply):
                self.network.publish(self, handle, reply)
            case AskReport(worker):
                self._send(self._subjects.worker_commands(worker) if worker else self._subjects.all_workers, Report())
            case StartMigration():
                self._order(command)
            case Announce() | MigrationPriced() | MigrationSettled() | WantGpus():
                pass
            case _:
                assert_never(command)

    def _order(self, command: StartMigration) -> None:
        def answered(reply: object) -> None:
            if not isinstance(reply, MigrateAccepted):
                reason = reply.reason if isinstance(reply, MigrateRefused) else "unreachable"
                order = command.order
                self.handle(
                    MigrationFailed(
                        worker=command.source, migration=order.migration, sequence=order.sequence,
                        generation=order.generation, reason=reason, message=str(reply),
                    )
                )  # fmt: skip

        self.judge.ordered(command.order)
        subject = self._subjects.worker_commands(command.source)
        timeout_us = round(self._settings.migrate_timeout_s * 1e6)
        self.network.request(
            self, subject, command.order, replies=WORKER_REPLY, timeout_us=timeout_us, answered=answered
        )

    def _send(self, subject: str, message: Message) -> None:
        self.network.publish(self, subject, message)
