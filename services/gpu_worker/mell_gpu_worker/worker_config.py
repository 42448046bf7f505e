"""What the core and the schedulers are told of this worker: from its settings, its engine, and what was measured."""

from dataclasses import dataclass

from mell_gpu_worker.core.config import WorkerConfig
from mell_gpu_worker.core.migration.limits import MoveLimits
from mell_gpu_worker.engine.base import EngineSpec
from mell_gpu_worker.prefill_profile import Profile
from mell_gpu_worker.settings import WorkerSettings
from mell_gpu_worker.transport.factory import transport_kind
from mell_shared.messages.base import MigrationMode
from mell_shared.messages.scheduler import WorkerSpec

_KV_MODES: tuple[MigrationMode, ...] = ("kv", "hybrid")


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured at start; 0 and empty: it was not."""

    link_bytes_per_s: int = 0
    prefill: Profile = ()


def modes_of(settings: WorkerSettings, engine: EngineSpec) -> tuple[MigrationMode, ...]:
    """Return the ways in which sequences may be moved in and out: those asked for that engine and transport have."""
    modes = tuple(mode for mode in engine.migration_modes if mode in settings.migration_modes)
    if (
        needs_data_port(engine, modes)
        and engine.device.startswith("cuda")
        and transport_kind(settings.transport) == "tcp"
    ):
        return tuple(mode for mode in modes if mode not in _KV_MODES)
    return modes


def needs_data_port(engine: EngineSpec, modes: tuple[MigrationMode, ...]) -> bool:
    """Whether moves by these modes send blocks from worker to worker."""
    return engine.can.kv == "sent" and bool(set(_KV_MODES) & set(modes))


def core_config(
    settings: WorkerSettings, worker: str, engine: EngineSpec, measured: Measured | None = None
) -> WorkerConfig:
    """Return what the core needs to know of its settings and its engine."""
    return WorkerConfig(
        spec=_spec(settings, worker, engine, measured or Measured()),
        vocab_size=engine.vocab_size,
        eos_token_ids=engine.eos_token_ids,
        max_step_tokens=settings.max_step_tokens,
        prefix_cache=settings.prefix_cache and engine.can.prefix_cache,
        report_interval_us=round(settings.report_interval_s * 1e6),
        status_interval_us=round(settings.status_interval_s * 1e6),
        frontend_silence_us=round(settings.frontend_silence_s * 1e6),
        stop_deadline_us=round(settings.stop_deadline_s * 1e6),
        can=engine.can,
        kv_source=engine.kv_source,
        moves=MoveLimits(
            max_outgoing=settings.max_outgoing_moves,
            max_incoming=settings.max_incoming_moves,
            move_us=round(settings.move_timeout_s * 1e6),
            reservation_us=round((settings.move_timeout_s + _COMMIT_S) * 1e6),
        ),
    )


_COMMIT_S = 5.0
"""A reservation outlives the copying by this, so that what was copied in time can be committed."""


def _spec(settings: WorkerSettings, worker: str, engine: EngineSpec, measured: Measured) -> WorkerSpec:
    return WorkerSpec(
        worker=worker,
        name=settings.worker_name,
        host=settings.worker_host,
        model=settings.public_model,
        engine=engine.name,
        device=engine.device,
        kv_layout=engine.kv_layout,
        max_model_len=engine.max_model_len,
        kv_blocks=engine.kv_blocks,
        block_tokens=engine.block_tokens,
        max_sequences=settings.max_sequences,
        migration_modes=modes_of(settings, engine),
        max_outgoing_moves=settings.max_outgoing_moves,
        max_incoming_moves=settings.max_incoming_moves,
        kv_bytes_per_token=engine.kv_bytes_per_token,
        link_bytes_per_s=measured.link_bytes_per_s,
        prefill_tokens_per_s=measured.prefill[0][1] if measured.prefill else 0,
        profiled_batches=[batch for batch, _ in measured.prefill],
        profiled_tokens_per_s=[rate for _, rate in measured.prefill],
    )
