"""The scheduler's pure core: events in, commands out; no IO, clock, randomness or logging."""

from mell_scheduler.core.scheduler import SchedulerCore
from mell_scheduler.core.values import (
    Announce,
    AskReport,
    Command,
    ConnectionRestored,
    CoreSettings,
    Event,
    LeadershipEnded,
    LeadershipTaken,
    PlaceRequested,
    Reply,
    Tick,
)

__all__ = [
    "Announce",
    "AskReport",
    "Command",
    "ConnectionRestored",
    "CoreSettings",
    "Event",
    "LeadershipEnded",
    "LeadershipTaken",
    "PlaceRequested",
    "Reply",
    "SchedulerCore",
    "Tick",
]
