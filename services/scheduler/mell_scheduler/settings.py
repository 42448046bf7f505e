"""Every setting of the scheduler, and the part of them that its core gets to see."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from mell_scheduler.core import CoreSettings
from mell_scheduler.policy import POLICY_NAMES, PolicySettings
from mell_shared.settings import ServiceSettings


class SchedulerSettings(ServiceSettings):
    """How one scheduler places, judges workers, and stands for leader."""

    scheduler_name: str = Field(
        "scheduler", min_length=1, description="Name in status and logs; its id adds a fresh suffix."
    )
    policy: str = Field("best-fit", description=f"Packing policy: {', '.join(POLICY_NAMES)}.")
    head_room: float = Field(0.1, ge=0, lt=1, description="Share of a worker's KV that arrivals leave for growth.")
    report_interval_s: float = Field(1.0, gt=0, le=60, description="Time between workers' reports; as set for them.")
    submit_timeout_s: float = Field(5.0, gt=0, description="A placement that no report confirms counts this long.")
    worker_lost_s: float = Field(10.0, gt=0, description="A worker silent this long is forgotten.")
    worker_grace_s: float = Field(
        5.0, ge=0, description="How long requests wait for a worker of their model to appear."
    )
    queue_limit: int = Field(1_000, ge=1, description="Most requests that wait for room.")
    queue_hold_s: float = Field(0.8, gt=0, le=1.5, description="How long a waiting frontend's answer is held back.")
    queue_renew_s: float = Field(3.0, gt=0, description="A waiting request not repeated for this long is dropped.")
    tpot_target_ms: float = Field(0.0, ge=0, description="Longest step of a worker that still gets work; 0: any.")
    lease: Literal["on", "off"] = Field("on", description="`off`: lead without a lease; only for a single scheduler.")
    event_log: Path | None = Field(None, description="File that takes every event of the core, to replay decisions.")

    @field_validator("policy")
    @classmethod
    def _policy_is_known(cls, name: str) -> str:
        if name not in POLICY_NAMES:
            raise ValueError(f"choose one of {', '.join(POLICY_NAMES)}")
        return name

    @model_validator(mode="after")
    def _times_agree(self) -> Self:
        if self.queue_renew_s <= self.queue_hold_s:
            raise ValueError(f"queue_renew_s ({self.queue_renew_s}) must be over queue_hold_s ({self.queue_hold_s})")
        if self.worker_lost_s <= 3 * self.report_interval_s:
            least_s = 3 * self.report_interval_s
            raise ValueError(f"worker_lost_s ({self.worker_lost_s}) must be over three report intervals ({least_s})")
        return self

    def core_settings(self) -> CoreSettings:
        """Return what the core needs to know."""
        return CoreSettings(
            report_interval_us=_us(self.report_interval_s),
            submit_timeout_us=_us(self.submit_timeout_s),
            worker_lost_us=_us(self.worker_lost_s),
            worker_grace_us=_us(self.worker_grace_s),
            queue_limit=self.queue_limit,
            queue_hold_us=_us(self.queue_hold_s),
            queue_renew_us=_us(self.queue_renew_s),
            tpot_target_us=_us(self.tpot_target_ms / 1_000),
        )

    def policy_settings(self) -> PolicySettings:
        """Return what the policy needs to know."""
        return PolicySettings(head_room=self.head_room)


def _us(seconds: float) -> int:
    return round(seconds * 1_000_000)
