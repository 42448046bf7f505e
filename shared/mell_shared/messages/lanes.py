"""Messages by which workers measure the lanes between them when they get to know each other."""

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from mell_shared.messages.base import Id, Message


class LaneGreeting(Message):
    """A new worker is there; whoever has KV of the same layout may measure the lane to it. Published to all workers."""

    kind: Literal["lane_greeting"] = "lane_greeting"
    worker: Id
    kv_layout: str


class ProbeRequested(Message):
    """A worker wants to measure its lane to the receiver."""

    kind: Literal["probe_requested"] = "probe_requested"
    worker: Id
    kv_layout: str


class ProbeOffered(Message):
    """Scratch memory waits at `address` for whoever names `secret`."""

    kind: Literal["probe_offered"] = "probe_offered"
    address: str
    secret: bytes


class ProbeRefused(Message):
    """Not now (`busy`), or not at all."""

    kind: Literal["probe_refused"] = "probe_refused"
    busy: bool
    message: str


LaneMessage = Annotated[LaneGreeting | ProbeRequested, Field(discriminator="kind")]
ProbeReply = Annotated[ProbeOffered | ProbeRefused, Field(discriminator="kind")]

LANE_MESSAGE: TypeAdapter[LaneMessage] = TypeAdapter(LaneMessage)
PROBE_REPLY: TypeAdapter[ProbeReply] = TypeAdapter(ProbeReply)
