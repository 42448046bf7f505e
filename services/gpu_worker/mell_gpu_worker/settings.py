"""Every setting of a GPU worker, and the part of them that engines get to see."""

import socket
from pathlib import Path
from typing import Literal, Self, get_args

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from mell_gpu_worker.engine.options import EngineOptions
from mell_shared.messages.base import MigrationMode
from mell_shared.models import DEFAULT_MODEL, FAKE_MODEL, default_model_dir
from mell_shared.settings import ServiceSettings, StringList


class WorkerSettings(ServiceSettings):
    """What one GPU worker runs, on what, and how it behaves towards the cluster."""

    model_config = SettingsConfigDict(cli_prog_name="mell serve gpu-worker")

    worker_name: str = Field("worker", min_length=1, description="Name in status and logs; its id adds a fresh suffix.")
    worker_host: str = Field(default_factory=socket.gethostname, description="Machine that the worker says it is on.")
    engine: Literal["torch", "fake", "vllm"] = Field(
        "torch", description="`torch`: real models; `fake`: no weights, for tests; `vllm`: a vLLM server."
    )
    model: str = Field(DEFAULT_MODEL, min_length=1, description="Store name, folder or hub id of the model.")
    served_model_name: str = Field("", description="Name that clients use for the model; empty: `model` itself.")
    model_dir: Path = Field(default_factory=default_model_dir, description="Folder of pulled models.")
    device: str = Field("auto", description="`auto`, `cpu`, `cuda` or `cuda:N`.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Of weights and KV; `auto`: float32 on CPU, bfloat16 on CUDA."
    )
    threads: int = Field(0, ge=0, description="CPU threads of the engine; 0: all cores.")
    compile: Literal["auto", "off"] = Field(
        "auto",
        description="`auto`: steps in C++ on CPUs that have a compiler, for models it knows, decodes in CUDA graphs on "
        "GPUs; `off`: in Python.",
    )
    kv_blocks: int = Field(0, ge=0, description="KV pool size in blocks; 0: what `memory_share` gives.")
    memory_share: float = Field(0.5, gt=0, le=0.95, description="Share of free memory for the KV pool.")
    block_tokens: int = Field(
        16, ge=0, le=4096, description="Tokens in one KV block; equal in the whole cluster; with vLLM the server's."
    )
    max_model_len: int = Field(0, ge=0, description="Longest sequence in tokens; 0: the model's context.")
    max_sequences: int = Field(256, ge=1, description="Most sequences held at once.")
    max_step_tokens: int = Field(512, ge=1, description="Most tokens computed in one engine step.")
    prefix_cache: bool = Field(True, description="Reuse the KV of equal beginnings.")

    report_interval_s: float = Field(1.0, gt=0, le=60, description="Time between reports to the scheduler.")
    status_interval_s: float = Field(1.0, gt=0, le=60, description="Time between stream statuses to frontends.")
    frontend_silence_s: float = Field(30.0, gt=0, description="A frontend silent this long loses its sequences.")
    step_timeout_s: float = Field(300.0, gt=0, description="An engine step longer than this is a failed engine.")
    stop_deadline_s: float = Field(30.0, ge=0, description="After SIGTERM, the longest wait for running sequences.")

    migration_modes: StringList = Field(
        ["kv", "tokens", "hybrid"], description="Ways in which sequences may be moved; empty: they never are."
    )
    max_outgoing_moves: int = Field(8, ge=1, le=1024, description="Most sequences moved away at once.")
    max_incoming_moves: int = Field(8, ge=1, le=1024, description="Most sequences moved here at once.")
    move_timeout_s: float = Field(25.0, gt=0, description="A move still copying after this has failed.")
    transport: Literal["auto", "ucx", "tcp"] = Field(
        "auto", description="What KV travels over, equal in the whole cluster; `auto`: UCX where it is installed."
    )
    data_host: str = Field(
        "", description="Address at which other workers reach this one; empty: the one that it reaches the broker from."
    )
    data_port: int = Field(0, ge=0, le=65535, description="Port that KV comes in by; 0: a free one.")
    max_transfer_bytes: int = Field(64 * 2**30, ge=1, description="Largest transfer that is accepted or offered.")
    chunk_bytes: int = Field(2**20, ge=2**12, le=2**24, description="Most bytes of KV under one checksum.")
    chunks_in_flight: int = Field(32, ge=1, le=1024, description="Most chunks of one transfer on their way at once.")
    ucx_net_devices: str = Field("", description="Interfaces that UCX may use; empty: its choice, `lo` on loopback.")
    ucx_tls: str = Field("", description="Transports that UCX may use, as in UCX_TLS; empty: its choice.")
    link_bytes_per_s: int = Field(0, ge=0, description="What the network carries each way; 0: measured at start.")
    slow_link_bytes_per_s: float = Field(
        0.0, ge=0, description="A lane measured slower than this is warned of; 0: 500 MB/s for a GPU's, 50 MB/s else."
    )
    lane_probes: int = Field(8, ge=0, description="Most lanes to other workers measured in a minute; 0: none.")
    profile_s: float = Field(
        3.0, ge=0, description="Longest time spent at start to measure prefill beside decodes; 0: not measured."
    )
    profile_stretch: float = Field(
        0.25, gt=0, le=10, description="Share by which prefill for moved sequences may lengthen a decode step."
    )

    vllm_url: str = Field("http://127.0.0.1:8001", description="vLLM engine: where its server listens.")
    vllm_model: str = Field("", description="vLLM engine: the model's name there; empty: the only one served.")
    vllm_api_key: str = Field("", description="vLLM engine: key that its server asks for; better as a variable.")
    vllm_command: str = Field("", description="vLLM engine: command that starts the server; empty: it runs already.")
    vllm_start_s: float = Field(600.0, gt=0, description="vLLM engine: longest wait for a server that it starts.")
    vllm_away_s: float = Field(
        10.0, ge=0, description="vLLM engine: a server silent this long loses its sequences to other workers."
    )

    fake_step_us: int = Field(0, ge=0, description="Fake engine: fixed time of a step.")
    fake_sequence_us: int = Field(0, ge=0, description="Fake engine: time added for each sequence in a step.")
    fake_prefill_token_us: int = Field(0, ge=0, description="Fake engine: time added for each prompt token.")
    fake_kv_bytes_per_token: int = Field(
        8, ge=8, multiple_of=8, description="Fake engine: bytes of KV for each token, as large as a real model's."
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_engine(cls, values: dict[str, object]) -> dict[str, object]:
        if values.get("engine") == "fake":
            values.setdefault("model", FAKE_MODEL)
        if values.get("engine") == "vllm":
            values.setdefault("block_tokens", 0)
        return values

    @model_validator(mode="after")
    def _blocks_hold_tokens(self) -> Self:
        if not self.block_tokens and self.engine != "vllm":
            raise ValueError("block_tokens 0 leaves the size to a vLLM server; other engines need a number")
        return self

    @model_validator(mode="after")
    def _step_holds_all_decodes(self) -> Self:
        # Else a full batch of decodes would leave no budget for them all, and none for prefill.
        if self.max_step_tokens < self.max_sequences:
            raise ValueError(
                f"max_step_tokens ({self.max_step_tokens}) must be at least max_sequences ({self.max_sequences})"
            )
        return self

    @model_validator(mode="after")
    def _modes_are_known(self) -> Self:
        unknown = sorted(set(self.migration_modes) - set(get_args(MigrationMode)))
        if unknown:
            raise ValueError(f"{unknown[0]!r} is no migration mode: kv, tokens and hybrid are")
        return self

    def slow_lane(self, device: str) -> float:
        """Return below which speed the lanes of a worker with this device are warned of, in bytes per second."""
        return self.slow_link_bytes_per_s or (0.5e9 if device.startswith("cuda") else 50e6)

    @property
    def public_model(self) -> str:
        """The model's name as clients and the scheduler know it."""
        return self.served_model_name or self.model

    @property
    def engine_options(self) -> EngineOptions:
        """What the engine gets to see."""
        return EngineOptions(**{name: getattr(self, name) for name in EngineOptions.__dataclass_fields__})
