"""A process of the cluster: its clock, its life, and what waits for it while it is stopped."""

from collections.abc import Callable

from mell_shared.actor import STOOD_STILL_S
from tests.cluster.simulation.clock import Action, EventQueue, LocalClock

STOOD_STILL_US = round(STOOD_STILL_S * 1e6)


class Process:
    """One incarnation on a machine (`node`). What comes to a dead one is lost, to a stopped one waits."""

    def __init__(self, node: str, name: str, clock: LocalClock) -> None:
        self.node = node
        self.name = name
        self.clock = clock
        self.alive = True
        self._held: list[Action] | None = None

    @property
    def queue(self) -> EventQueue:
        """The queue of the whole run."""
        return self.clock.queue

    @property
    def paused(self) -> bool:
        """Whether it is stopped."""
        return self._held is not None

    def take(self, action: Action) -> None:
        """Let something reach the process."""
        if not self.alive:
            return
        if self._held is not None:
            self._held.append(action)
        else:
            action()

    def after(self, local_us: int, action: Action) -> None:
        """Set a timer, in local time."""
        self.queue.after(self.clock.real_us(max(0, local_us)), lambda: self.take(action))

    def every(self, local_us: int, action: Action, after_standstill: Action) -> None:
        """Set a timer again and again; rounds missed while stopped are one, which another action precedes."""

        def turn(due_us: int) -> None:
            if self.clock.now_us() - due_us > STOOD_STILL_US:
                after_standstill()
            action()
            begin()

        def begin() -> None:
            due_us = self.clock.now_us() + local_us
            self.after(local_us, lambda: turn(due_us))

        begin()

    def stop(self) -> None:
        """Do nothing from now on."""
        if self._held is None:
            self._held = []

    def resume(self) -> None:
        """Do all that waits."""
        held, self._held = self._held or [], None
        for action in held:
            self.take(action)

    def die(self) -> None:
        """Be no more."""
        self.alive = False
        self._held = None

    # --- what the network tells; the services override these

    def connection_lost(self) -> None:
        """The connection to the broker is down."""

    def connection_restored(self) -> None:
        """It is up again."""


Answered = Callable[[object], None]
"""Takes a reply, or the `AskFailure` in its place."""
