"""What a frontend tells those who watch the cluster (`/admin/live`): a state each interval, as JSON."""

from pydantic import TypeAdapter

from mell_shared.messages.admin import Status
from mell_shared.messages.base import Message


class LiveRows(Message):
    """Every sequence, as columns: `worker` and `target` are positions in the status's workers, -1 if there is none."""

    sequence: list[str] = []
    worker: list[int] = []
    target: list[int] = []
    tokens: list[int] = []
    blocks: list[int] = []
    state: list[int] = []
    """Positions in `SEQUENCE_STATES`: running, placed, moving, waiting."""


class GpusLately(Message):
    """GPUs in use at the last epochs, `sample_s` apart, the latest last; `shadow` is empty if nothing is compared."""

    sample_s: float = 1.0
    used: list[int] = []
    shadow: list[int] = []


class FrontendFigures(Message):
    """What the frontend that tells this sees itself; others have their own."""

    frontend: str = ""
    streams: int = 0
    """Sequences open there."""
    tokens_per_s: float = 0.0
    """Taken from workers since the last state."""
    first_tokens: int = 0
    """Answers begun in the last minute; their times to the first token:"""
    ttft_p50_s: float = 0.0
    ttft_p99_s: float = 0.0


class LiveState(Message):
    """The data of an event `state`."""

    number: int
    """Rises with each state of this frontend."""
    interval_s: float
    status: Status
    rows: LiveRows
    lately: GpusLately
    frontend: FrontendFigures


class LiveTrouble(Message):
    """The data of an event `trouble`: no state just now, and why; the next comes when it can."""

    number: int
    message: str


LIVE_STATE: TypeAdapter[LiveState] = TypeAdapter(LiveState)
LIVE_TROUBLE: TypeAdapter[LiveTrouble] = TypeAdapter(LiveTrouble)
