"""What `mell up` can be told."""

from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from mell_console.scaler.values import Limits
from mell_console.up.worker_range import WorkerRange, bounds
from mell_shared.models import DEFAULT_MODEL, default_model_dir
from mell_shared.settings import CommandLineSettings, StringList


class UpSettings(CommandLineSettings):
    """A stack on this machine. Settings of single services go by their own MELL_ variables, which are passed on."""

    model_config = SettingsConfigDict(cli_prog_name="mell up")

    model: StringList = Field([], description=f"Model to serve, may be repeated; {DEFAULT_MODEL} if none is named.")
    served_model_name: StringList = Field([], description="Names that clients use instead, one for each --model.")
    engine: Literal["torch", "fake", "vllm"] = Field(
        "torch", description="`fake` needs no model: it invents text; `vllm`: servers that run already."
    )
    vllm_url: StringList = Field([], description="vLLM servers; each gets a worker, whatever `workers` says.")
    workers: WorkerRange = Field(
        "2", description="GPU workers, models and GPUs dealt out in turn; 1..4: as many of these as are needed."
    )
    spare_workers: int = Field(0, ge=0, description="With 1..4: workers beyond those needed, for arrivals.")
    scale_up_s: float = Field(
        1.0, ge=0, description="With 1..4: workers are started once more have been needed for so long."
    )
    scale_down_s: float = Field(
        30.0, ge=0, description="With 1..4: one is stopped once fewer have been needed for so long without a break."
    )
    scale_cooldown_s: float = Field(
        5.0, ge=0, description="With 1..4: nothing is stopped for so long after a start or a stop."
    )
    host: str = Field("127.0.0.1", description="Interface of the HTTP port; 0.0.0.0 lets others in.")
    port: int = Field(8000, ge=0, le=65535, description="HTTP port; 0 takes a free one.")
    devices: str = Field("auto", description="`auto`, `cpu`, or GPU indices such as 0,1.")
    kv_blocks: int = Field(0, ge=0, description="KV blocks of each worker; 0: what `memory_share` gives.")
    memory_share: float = Field(
        0.0, ge=0, le=0.95, description="Of the free memory, for all KV together; 0: 0.5, and 0.85 of a GPU's."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Of weights and KV; `auto`: float32 on CPU, the model's own on CUDA."
    )
    max_model_len: int = Field(0, ge=0, description="Longest sequence in tokens; 0: the model's context.")
    model_dir: Path = Field(default_factory=default_model_dir, description="Folder that models are kept in.")
    nats_url: str = Field("", description="An outside broker to use; unset: one is started for this run.")
    log_dir: str = Field("", description="Folder for this run's logs; empty: a new one in ~/.local/state/mell.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe level logged.")
    metrics_port: int = Field(
        0, ge=0, le=65000, description="First of the metrics ports (scheduler, then workers); 0: none."
    )
    ready_s: float = Field(300.0, gt=0, description="How long the services may take to get ready.")
    stop_s: float = Field(
        15.0, gt=0, description="How long each service may take to stop before it is killed; streams have 60% of it."
    )

    @property
    def least_workers(self) -> int:
        """Workers to begin with."""
        return bounds(self.workers)[0]

    @property
    def most_workers(self) -> int:
        """Workers there may be in the end."""
        return bounds(self.workers)[1]

    @property
    def scales(self) -> bool:
        """Whether the number of workers follows the load."""
        return self.least_workers < self.most_workers

    def scale_limits(self) -> Limits:
        """Return what the scaler needs to know."""
        return Limits(
            least=self.least_workers,
            most=self.most_workers,
            spare=self.spare_workers,
            up_us=round(self.scale_up_s * 1e6),
            down_us=round(self.scale_down_s * 1e6),
            cooldown_us=round(self.scale_cooldown_s * 1e6),
            start_us=round(self.ready_s * 1e6),
            stop_us=round(2 * self.stop_s * 1e6),
        )
