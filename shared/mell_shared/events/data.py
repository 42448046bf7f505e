"""What each event says. Ids, numbers and names only: never a prompt, an output, or a message that could quote one."""

from typing import ClassVar, Literal

from pydantic import Field

from mell_shared.messages.base import Generation, Id, Label, Message, MigrationMode


class EventData(Message):
    """The `data` of an event; its class's docstring is its description for others."""

    TYPE: ClassVar[str]
    """The event's type, and the end of its subject."""
    TELLER: ClassVar[Literal["frontend", "scheduler"]] = "scheduler"
    """Which service tells it."""

    @property
    def about(self) -> str:
        """Return what the event is about: the `subject` attribute of its envelope."""
        return ""


class RequestEvent(EventData):
    """Of one HTTP request for text, told by its frontend."""

    TELLER = "frontend"
    request_id: str = Field(description="`x-request-id`: the client's own, or made for it.")
    answer_id: str = Field(description="What the answer calls itself (`chatcmpl-...`); sequences begin with it.")
    model: str
    key: Label = Field("", description="The name of the API key, if it has one.")

    @property
    def about(self) -> str:
        """Return the answer's id."""
        return self.answer_id


class RequestArrived(RequestEvent):
    """A request was read, found valid, and is about to be placed. One `request.finished` or `.refused` follows."""

    TYPE = "request.arrived"
    stream: bool
    choices: int = Field(ge=1, description="Sequences that it asks for.")
    prompt_tokens: int = Field(ge=1)


class RequestFinished(RequestEvent):
    """A request that got tokens is over, whether it got all of them or not."""

    TYPE = "request.finished"
    outcome: Literal["complete", "failed", "client_gone"]
    error: Label = Field("", description="The code that the client was told, if it failed.")
    choices: int = Field(ge=1)
    finish_reasons: dict[str, int] = Field(description="How many choices ended for which reason.")
    prompt_tokens: int = Field(ge=0)
    cached_tokens: int = Field(ge=0, description="Of the prompt's, those that needed no prefill.")
    completion_tokens: int = Field(ge=0)
    ttft_s: float = Field(ge=0, description="From arrival to the first token, in seconds.")
    duration_s: float = Field(ge=0)


class RequestRefused(RequestEvent):
    """A request ended without a token: no room, no worker, too long, or its client left before it began."""

    TYPE = "request.refused"
    status: int = Field(description="HTTP status of the answer; 499: the client left.")
    error: Label = Field("", description="The code that the client was told.")
    duration_s: float = Field(ge=0)


class SequenceEvent(EventData):
    """Of one sequence (a request's choice), told by the scheduler."""

    sequence: Id
    request_id: Label = Field("", description="`x-request-id`, if this scheduler placed it.")
    model: Label

    @property
    def about(self) -> str:
        """Return the sequence."""
        return self.sequence


class RequestPlaced(SequenceEvent):
    """A sequence was given a worker; again, under a higher generation, if it was lost or refused there."""

    TYPE = "request.placed"
    worker: Id
    generation: Generation
    prompt_tokens: int = Field(ge=1)
    waited_s: float = Field(ge=0, description="In the queue, as its frontend counts it.")


class MoveEvent(SequenceEvent):
    """Of one move of a sequence between workers."""

    migration: Id
    source: Id
    target: Id
    mode: MigrationMode
    cause: Label = Field(description="Why it was ordered: `overload`, `drain`, `consolidate`, `attached`, `manual`.")
    blocks: int = Field(ge=0, description="KV blocks that were planned for.")
    predicted_s: float = Field(ge=0)
    took_s: float = Field(ge=0, description="From the order to the news of its end.")


class RequestMigrated(MoveEvent):
    """A sequence goes on at another worker. What the workers did not tell is 0."""

    TYPE = "request.migrated"
    stopped_s: float = Field(ge=0, description="From the last token at the source to the first at the target.")
    copied_bytes: int = Field(ge=0)
    copy_s: float = Field(ge=0)
    prefilled_tokens: int = Field(ge=0)
    prefill_s: float = Field(ge=0)


class MigrationFailed(MoveEvent):
    """A move came to nothing; the sequence stays where it was, or has ended (`outcome` is `ended`)."""

    TYPE = "migration.failed"
    outcome: Literal["failed", "timeout", "ended"]
    reason: Label = Field(description="In one word: `no_room`, `link`, `timeout`, ...")


class WorkerEvent(EventData):
    """Of one worker incarnation, told by the scheduler."""

    worker: Id
    name: Label = ""
    model: Label = ""

    @property
    def about(self) -> str:
        """Return the worker."""
        return self.worker


class WorkerJoined(WorkerEvent):
    """A worker is there and may get work once it has reported."""

    TYPE = "worker.joined"
    host: Label
    engine: Label
    device: Label
    kv_blocks: int = Field(ge=1)
    block_tokens: int = Field(ge=1)


class WorkerActive(WorkerEvent):
    """A worker holds sequences."""

    TYPE = "worker.active"


class WorkerStandby(WorkerEvent):
    """A worker is ready, and empty."""

    TYPE = "worker.standby"


class WorkerDraining(WorkerEvent):
    """A worker takes nothing new and is being emptied."""

    TYPE = "worker.draining"


class WorkerDrained(WorkerEvent):
    """A draining worker is empty: it may be stopped."""

    TYPE = "worker.drained"


class WorkerSilent(WorkerEvent):
    """A worker has missed reports: it gets nothing new."""

    TYPE = "worker.silent"


class WorkerLeft(WorkerEvent):
    """A worker said goodbye."""

    TYPE = "worker.left"
    reason: str


class WorkerLost(WorkerEvent):
    """A worker was silent for too long and is forgotten; what it held is placed again."""

    TYPE = "worker.lost"
    reason: str


class GpusWanted(EventData):
    """How many workers a model should have up has changed."""

    TYPE = "gpus.wanted"
    model: Id
    gpus: int = Field(ge=0)

    @property
    def about(self) -> str:
        """Return the model."""
        return self.model


class WorkerFacts(Message):
    """One worker in a scheduler's state."""

    worker: Id
    name: Label
    model: Label
    state: Literal["active", "standby", "draining", "drained", "silent"]
    kv_blocks: int
    used_blocks: int
    sequences: int


class ModelFacts(Message):
    """One model in a scheduler's state."""

    model: Id
    gpus_wanted: int


class SchedulerState(EventData):
    """The cluster as the leading scheduler sees it: when it begins to lead, after a gap, and each minute."""

    TYPE = "scheduler.state"
    term: int = Field(description="Rises with every leader.")
    policy: str
    workers: tuple[WorkerFacts, ...]
    workers_left_out: int = Field(0, ge=0, description="Workers that found no room in this event.")
    models: tuple[ModelFacts, ...]
    queued: int = Field(ge=0)
    sequences: int = Field(ge=0, description="Sequences placed or running.")
    migrating: int = Field(ge=0)


class FrontendState(EventData):
    """A frontend's open requests: when it begins, after a gap, and each minute."""

    TYPE = "frontend.state"
    TELLER = "frontend"
    open_requests: tuple[str, ...] = Field(description="Answer ids of the requests that have arrived and not ended.")
    left_out: int = Field(0, ge=0, description="Open requests that found no room in this event.")


EVENT_DATA: tuple[type[EventData], ...] = (
    RequestArrived,
    RequestPlaced,
    RequestMigrated,
    RequestFinished,
    RequestRefused,
    MigrationFailed,
    WorkerJoined,
    WorkerActive,
    WorkerStandby,
    WorkerDraining,
    WorkerDrained,
    WorkerSilent,
    WorkerLeft,
    WorkerLost,
    GpusWanted,
    SchedulerState,
    FrontendState,
)
"""Every event there is."""
