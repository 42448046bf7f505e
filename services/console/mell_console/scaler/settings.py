"""What `mell scaler` can be told."""

from typing import Literal, Self

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from mell_console.scaler.values import Limits, Order
from mell_shared.settings import CommandLineSettings, StringList


class ScalerSettings(CommandLineSettings):
    """Start and stop workers by a command, as many as the scheduler wants. One scaler for each model."""

    model_config = SettingsConfigDict(cli_prog_name="mell scaler")

    url: str = Field("http://127.0.0.1:8000", pattern=r"^https?://", description="Where a frontend answers.")
    admin_key: str = Field("", repr=False, description="The frontend's admin key; on its own machine it may need none.")
    scale_command: StringList = Field(
        [], description="Program and arguments that start and stop workers: docs/scaling.md says what it is given."
    )
    scale_command_s: float = Field(120.0, gt=0, description="How long the command may take.")
    scale_model: str = Field("", description="Model to scale, as clients call it; empty: the only one there is.")
    min_workers: int = Field(1, ge=1, le=10_000, description="Fewest workers.")
    max_workers: int = Field(4, ge=1, le=10_000, description="Most workers.")
    spare_workers: int = Field(0, ge=0, description="Workers kept beyond those wanted, for arrivals to come.")
    scale_up_s: float = Field(1.0, ge=0, description="More workers are started once they have been wanted for so long.")
    scale_down_s: float = Field(
        60.0, ge=0, description="A worker is stopped once fewer have been wanted for so long without a break."
    )
    scale_cooldown_s: float = Field(10.0, ge=0, description="Nothing is stopped for so long after a start or a stop.")
    start_s: float = Field(300.0, gt=0, description="A worker not there so long after its start is asked for again.")
    stop_order: Order = Field(
        "any", description="Whom to stop: `any` empty worker, or the `last` by the number in its name (StatefulSet)."
    )
    new_worker_name: str = Field(
        "worker", pattern=r"^[A-Za-z0-9_-]+$", description="New workers are to be called this, with a number."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe level logged.")
    log_format: Literal["auto", "json", "console"] = Field(
        "auto", description="`auto`: console on a terminal, else json."
    )

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.max_workers < self.min_workers:
            raise ValueError(f"max_workers ({self.max_workers}) must be at least min_workers ({self.min_workers})")
        if not self.scale_command:
            raise ValueError("name the program that starts and stops workers: --scale-command PROGRAM")
        return self

    def limits(self) -> Limits:
        """Return what the core needs to know."""
        return Limits(
            least=self.min_workers,
            most=self.max_workers,
            spare=self.spare_workers,
            up_us=round(self.scale_up_s * 1e6),
            down_us=round(self.scale_down_s * 1e6),
            cooldown_us=round(self.scale_cooldown_s * 1e6),
            start_us=round(self.start_s * 1e6),
            order=self.stop_order,
            name=self.new_worker_name,
        )
