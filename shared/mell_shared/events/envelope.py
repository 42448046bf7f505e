"""The envelope of every event: CloudEvents 1.0, structured mode, JSON."""

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mell_shared.events.data import EventData

CONTENT_TYPE = "application/cloudevents+json"


class CloudEvent(BaseModel):
    """One event as it is written, and as others read it.

    `sequence` counts a source's events from 1, without holes: a hole is a loss that the reader can see.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    specversion: Literal["1.0"] = "1.0"
    id: str = Field(description="Unique within its source; here the same as `sequence`.")
    source: str = Field(description="`/PREFIX/scheduler/ID` or `/PREFIX/frontend/ID`, one process's life.")
    type: str
    subject: str | None = Field(None, description="The request, sequence, worker or model that it is about.")
    time: datetime = Field(description="When it happened, by the clock of its source.")
    datacontenttype: Literal["application/json"] = "application/json"
    sequence: str = Field(pattern=r"^[1-9][0-9]*$", description="The event's number at its source.")
    sequencetype: Literal["Integer"] = "Integer"
    data: dict[str, Any]

    @property
    def number(self) -> int:
        """Return the event's number at its source."""
        return int(self.sequence)


def enclosed(data: EventData, source: str, number: int, time: datetime) -> CloudEvent:
    """Return the event of `source` with this number."""
    return CloudEvent(
        id=str(number),
        source=source,
        type=data.TYPE,
        subject=data.about or None,
        time=time,
        sequence=str(number),
        data=data.model_dump(mode="json"),
    )


def source_name(prefix: str, role: str, process: str) -> str:
    """Return the `source` of a process's events."""
    return f"/{prefix}/{role}/{process}"
