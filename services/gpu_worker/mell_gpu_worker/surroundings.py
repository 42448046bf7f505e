"""What a worker's shell stands on; built once, in `__main__` or in a test, and handed down."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from mell_gpu_worker.metrics import DataCounts
from mell_gpu_worker.transport.base import Transport
from mell_shared.bus import Bus
from mell_shared.clock import Clock
from mell_shared.subjects import Subjects
from mell_shared.tracing import NO_TRACER, Tracer

Spawn = Callable[[Coroutine[Any, Any, None]], asyncio.Task[None] | None]
"""Runs work beside the caller, as `Actor.spawn`."""


@dataclass(frozen=True, slots=True)
class LaneOptions:
    """How much of the lanes to other workers is measured."""

    probes_per_minute: int = 8
    """Most probes served, so that joining a large cluster costs no more than a small one; 0: none, nor any made."""
    stagger_s: float = 2.0
    """Longest pause before a probe, drawn at random: all that hear a greeting do so at the same moment."""
    slow_bytes_per_s: float = 0.5e9
    """A lane slower than this is warned of."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """The broker and the data plane of one worker. Without a `transport` it moves nothing."""

    bus: Bus
    subjects: Subjects
    clock: Clock
    transport: Transport | None = None
    data_counts: DataCounts = field(default_factory=DataCounts)
    lanes: LaneOptions = LaneOptions()
    tracer: Tracer = NO_TRACER
