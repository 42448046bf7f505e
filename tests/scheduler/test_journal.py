import json
from pathlib import Path
from typing import ClassVar

import pytest

from mell_scheduler.core import (
    ConnectionRestored,
    CoreSettings,
    Event,
    LeadershipEnded,
    LeadershipTaken,
    OperatorAsked,
    PlaceRequested,
    Reply,
    Tick,
)
from mell_scheduler.core.journal import JournalError, event_line, header_line, read_event, replay
from mell_scheduler.event_log import EventLog
from mell_scheduler.policy import PolicySettings
from mell_shared.messages.admin import DrainRequest, MigrateRequest, MovingRequest
from mell_shared.messages.scheduler import (
    MigrationCommitted,
    MigrationFailed,
    SequenceFinished,
    WorkerJoined,
    WorkerLeft,
)
from tests.scheduler.script import place_request, placed, worker_report, worker_spec

HEADER = header_line("best-fit", PolicySettings(head_room=0.1), CoreSettings())
EVENTS: list[Event] = [
    LeadershipTaken(3),
    ConnectionRestored(),
    WorkerJoined(spec=worker_spec("w1")),
    worker_report(worker_spec("w1"), 1, ("s9", 4, 160, 10)),
    PlaceRequested("inbox", place_request("s1", excluded=("w2",), waited_s=0.25)),
    OperatorAsked("inbox", DrainRequest(worker="w1", deadline_s=1.5)),
    OperatorAsked("inbox", MigrateRequest(ask="a", request="s1", target="w2", mode="hybrid")),
    OperatorAsked("inbox", MovingRequest(paused=True)),
    Tick(),
    MigrationCommitted(worker="w2", source="w1", migration="1-1", sequence="s9", generation=5, copied_bytes=7),
    MigrationFailed(worker="w1", migration="1-2", sequence="s9", generation=4, reason="no_room"),
    SequenceFinished(worker="w1", sequence="s9", generation=4, reason="length"),
    WorkerLeft(worker="w1", reason="told to"),
    LeadershipEnded(),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_every_event_reads_back(event: Event) -> None:
    """A line holds all of an event, in plain JSON."""
    line = event_line(event, 17)
    assert json.loads(line)["at_us"] == 17
    assert read_event(line) == (17, event)


def test_a_replay_decides_again() -> None:
    """Events in, the same commands out, with their times."""
    lines = [HEADER, *(event_line(event, at_us) for at_us, event in enumerate(EVENTS))]
    again = list(replay(lines))
    assert [(at_us, event) for at_us, event, _ in again] == list(enumerate(EVENTS))
    assert again[4][2] == [Reply("inbox", "s1", placed("w1"))]


def test_a_new_term_begins_with_an_empty_core() -> None:
    """As it did live: nothing of an earlier term is remembered."""
    events = [*EVENTS, LeadershipTaken(4), PlaceRequested("inbox2", place_request("s1"))]
    again = list(replay([HEADER, *(event_line(event, at_us) for at_us, event in enumerate(events))]))
    assert again[-1][2] == []


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "line 1 is no journal header"),
        (["{}"], "line 1 is no journal header"),
        ([HEADER.replace('"journal": 3', '"journal": 9')], "version 9"),
        ([HEADER.replace("best-fit", "worst")], "unknown policy"),
        ([HEADER, "rubbish"], "line 2 is no event"),
        ([HEADER, '{"at_us": 1, "event": "nonsense"}'], "line 2 is no event"),
        ([HEADER, '{"at_us": 1, "event": "tick"}'], "line 2: an event before leadership was taken"),
    ],
)
def test_a_broken_journal_is_said_so(lines: list[str], said: str) -> None:
    """The error names the line."""
    with pytest.raises(JournalError, match=said):
        list(replay(lines))


def test_the_log_holds_header_and_events(tmp_path: Path) -> None:
    """After a tick all is on the disk, also without a clean end."""
    log = EventLog(tmp_path / "log.jsonl", HEADER)
    for at_us, event in enumerate(EVENTS[:9]):
        log.record(event, at_us)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert lines == [HEADER, *(event_line(event, at_us) for at_us, event in enumerate(EVENTS[:9]))]
    log.close()
    log.close()


class FullDisk:
    """A file on a disk without space."""

    closed: ClassVar[bool] = False

    def write(self, text: str) -> int:
        """Fail as a full disk does."""
        raise OSError(28, "No space left on device")

    flush = close = write


def test_a_full_disk_ends_the_log_not_the_scheduler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log is given up with a warning; recording goes on without effect."""
    log = EventLog(tmp_path / "log.jsonl", HEADER)
    log.close()
    monkeypatch.setattr(log, "_file", FullDisk())
    log.record(Tick(), 1)
    log.record(Tick(), 2)
    log.close()
    assert (tmp_path / "log.jsonl").read_text() == f"{HEADER}\n"
