"""What a worker's core is built from: plain values, taken from its settings and its engine."""

from dataclasses import dataclass, field

from mell_gpu_worker.core.capabilities import Capabilities
from mell_gpu_worker.core.migration.limits import MoveLimits
from mell_shared.messages.scheduler import WorkerSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """What a worker's core is built from."""

    spec: WorkerSpec
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    max_step_tokens: int
    prefix_cache: bool
    report_interval_us: int
    status_interval_us: int
    frontend_silence_us: int
    stop_deadline_us: int
    moves: MoveLimits = field(default_factory=MoveLimits)
    can: Capabilities = field(default_factory=Capabilities)
    kv_source: str = ""
    """Where other workers' engines can fetch KV from this one's, if these engines do."""
