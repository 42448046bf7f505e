"""What operators ask of the leading scheduler (through a frontend), and the answers."""

from typing import Literal

from pydantic import TypeAdapter

from mell_shared.messages.base import Id, Message


class StatusRequest(Message):
    """Ask for the state of the cluster as the scheduler sees it."""

    kind: Literal["status"] = "status"


class WorkerStatus(Message):
    """One worker in a status."""

    worker: Id
    name: str
    host: str
    model: Id
    engine: str
    device: str
    state: Literal["active", "draining", "standby", "silent"]
    kv_blocks: int
    used_blocks: int
    block_tokens: int
    running: int
    waiting: int
    step_us: int
    report_age_s: float


class ModelStatus(Message):
    """One model in a status; `gpus_wanted` is how many workers should be up."""

    model: Id
    gpus_wanted: int


class Status(Message):
    """The answer to `StatusRequest`."""

    kind: Literal["status_reply"] = "status_reply"
    scheduler: Id
    policy: str
    uptime_s: float
    workers: tuple[WorkerStatus, ...]
    queued: int
    placed: int
    rejected: int
    migrating: int = 0
    """Moves under way."""
    migrated: int = 0
    migrations_failed: int = 0
    models: tuple[ModelStatus, ...] = ()


STATUS_REQUEST: TypeAdapter[StatusRequest] = TypeAdapter(StatusRequest)
STATUS: TypeAdapter[Status] = TypeAdapter(Status)
