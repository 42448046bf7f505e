"""The scheduler's pure core: events in, commands out; no IO, clock, randomness or logging."""

from mell_scheduler.core.scheduler import SchedulerCore
from mell_scheduler.core.values import (
    Announce,
    Answer,
    AskReport,
    Command,
    ConnectionRestored,
    CoreSettings,
    Event,
    LeadershipEnded,
    LeadershipTaken,
    MigrationSettled,
    OperatorAsked,
    OrderDrain,
    PlaceRequested,
    Reply,
    StartMigration,
    Tick,
    WantGpus,
)

__all__ = [
    "Announce",
    "Answer",
    "AskReport",
    "Command",
    "ConnectionRestored",
    "CoreSettings",
    "Event",
    "LeadershipEnded",
    "LeadershipTaken",
    "MigrationSettled",
    "OperatorAsked",
    "OrderDrain",
    "PlaceRequested",
    "Reply",
    "SchedulerCore",
    "StartMigration",
    "Tick",
    "WantGpus",
]
