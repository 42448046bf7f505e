"""Every setting of the scheduler, and the part of them that its core gets to see."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from mell_scheduler.core import CoreSettings
from mell_scheduler.policy import (
    DEFAULT_POLICY,
    POLICY_NAMES,
    UNMOVED_NAMES,
    Policy,
    PolicySettings,
    check_policy,
    make_policy,
)
from mell_shared.settings import ServiceSettings

TICK_S = 0.1
"""Between two ticks of the core."""


class SchedulerSettings(ServiceSettings):
    """How one scheduler places, judges workers, and stands for leader."""

    model_config = SettingsConfigDict(cli_prog_name="mell serve scheduler")

    scheduler_name: str = Field(
        "scheduler", min_length=1, description="Name in status and logs; its id adds a fresh suffix."
    )
    policy: str = Field(
        DEFAULT_POLICY, description=f"Packing policy: {', '.join(POLICY_NAMES)}; or your own, module:class."
    )
    shadow_policy: str = Field(
        "worst-fit",
        description=f"Policy whose GPU-hours are shown beside those used: {', '.join(UNMOVED_NAMES)}; `none`: none.",
    )
    head_room: float = Field(
        0.1, ge=0, lt=1, description="Share of a worker's KV that arrivals leave for growth where nothing can be moved."
    )
    moving_head_room: float = Field(
        0.0, ge=0, lt=1, description="The same where sequences can be moved; 0: what the policy thinks best."
    )
    max_growth_tokens: int = Field(
        512, ge=0, description="Most tokens that a sequence is predicted to grow by in one epoch."
    )
    report_interval_s: float = Field(1.0, gt=0, le=60, description="Time between workers' reports; as set for them.")
    submit_timeout_s: float = Field(5.0, gt=0, description="A placement that no report confirms counts this long.")
    worker_lost_s: float = Field(10.0, gt=0, description="A worker silent this long is forgotten.")
    worker_grace_s: float = Field(
        5.0, ge=0, description="How long requests wait for a worker of their model to appear."
    )
    queue_limit: int = Field(1_000, ge=1, description="Most requests that wait for room.")
    queue_wait_s: float = Field(
        30.0, ge=0, description="Requests are refused that would wait longer, at the pace of those before; 0: none."
    )
    queue_hold_s: float = Field(0.8, gt=0, le=1.5, description="How long a waiting frontend's answer is held back.")
    queue_renew_s: float = Field(3.0, gt=0, description="A waiting request not repeated for this long is dropped.")
    epoch_s: float = Field(1.0, gt=0, le=60, description="Time between two plans of moves.")
    migrate_timeout_s: float = Field(2.0, gt=0, description="How long a worker may take to answer an order to move.")
    migration_timeout_s: float = Field(
        45.0, gt=0, description="A move not heard of for this long has failed; over what workers allow it in all."
    )
    cooldown_epochs: int = Field(
        5, ge=0, description="Epochs a moved sequence rests; overload and drain may move it sooner."
    )
    max_moves_per_epoch: int = Field(32, ge=0, description="Most moves begun in one epoch; 0: none is ever begun.")
    max_move_mb_per_epoch: float = Field(0.0, ge=0, description="Most KV copied by one epoch's moves; 0: no limit.")
    transfer_limit_s: float = Field(
        5.0, gt=0, description="Moves are begun only if link and target get through with them in this time."
    )
    link_mb_per_s: float = Field(125.0, gt=0, description="Bandwidth between workers that do not tell theirs.")
    prefill_tokens_per_s: int = Field(
        500, ge=0, description="What a worker can prefill for moves, if it does not tell; 0: nothing."
    )
    kv_bytes_per_token: int = Field(131_072, ge=1, description="KV of one token, for workers that do not tell.")
    step_base_us: int = Field(0, ge=0, description="With tpot_target_ms: a decode step's time without any sequence.")
    step_sequence_us: int = Field(0, ge=0, description="With tpot_target_ms: what each sequence adds to a step.")
    step_block_ns: int = Field(0, ge=0, description="With tpot_target_ms: what each KV block adds to a step.")
    tpot_target_ms: float = Field(0.0, ge=0, description="Longest step of a worker that still gets work; 0: any.")
    lease: Literal["on", "off"] = Field("on", description="`off`: lead without a lease; only for a single scheduler.")
    events: Literal["on", "off"] = Field("on", description="Events for other systems on JetStream; also at frontends.")
    events_max_age_h: float = Field(24.0, gt=0, description="Events older than this are deleted.")
    events_max_mb: int = Field(256, ge=1, description="Beyond this size of all events the oldest are deleted.")
    event_log: Path | None = Field(None, description="File that takes every event of the core, to replay decisions.")

    @field_validator("policy")
    @classmethod
    def _policy_is_known(cls, name: str) -> str:
        check_policy(name)
        return name

    @field_validator("shadow_policy")
    @classmethod
    def _shadow_moves_nothing(cls, name: str) -> str:
        if name not in (*UNMOVED_NAMES, "none"):
            raise ValueError(f"choose one that moves nothing: {', '.join(UNMOVED_NAMES)}; or none")
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
            report_late_us=_us(self.report_interval_s) // 5,
            plan_late_us=_us(TICK_S),
            submit_timeout_us=_us(self.submit_timeout_s),
            worker_lost_us=_us(self.worker_lost_s),
            worker_grace_us=_us(self.worker_grace_s),
            queue_limit=self.queue_limit,
            queue_wait_us=_us(self.queue_wait_s),
            queue_hold_us=_us(self.queue_hold_s),
            queue_renew_us=_us(self.queue_renew_s),
            tpot_target_us=_us(self.tpot_target_ms / 1_000),
            step_base_ns=1_000 * self.step_base_us,
            step_per_sequence_ns=1_000 * self.step_sequence_us,
            step_per_block_ns=self.step_block_ns,
            growth_limit_tokens=self.max_growth_tokens,
            epoch_us=_us(self.epoch_s),
            migration_timeout_us=_us(self.migration_timeout_s),
            transfer_limit_us=_us(self.transfer_limit_s),
            max_moves_per_epoch=self.max_moves_per_epoch,
            max_move_bytes_per_epoch=round(self.max_move_mb_per_epoch * 1e6) or 1 << 60,
            kv_bytes_per_token=self.kv_bytes_per_token,
            link_bytes_per_s=round(self.link_mb_per_s * 1e6),
            prefill_tokens_per_s=self.prefill_tokens_per_s,
        )

    def make_shadow(self) -> Policy | None:
        """Return the policy to compare with, if there is to be one."""
        return None if self.shadow_policy == "none" else make_policy(self.shadow_policy, self.policy_settings())

    def policy_settings(self) -> PolicySettings:
        """Return what the policy needs to know."""
        return PolicySettings(
            head_room=self.moving_head_room,
            fixed_head_room=self.head_room,
            cooldown_epochs=self.cooldown_epochs,
            max_moves_per_epoch=self.max_moves_per_epoch,
        )


def _us(seconds: float) -> int:
    return round(seconds * 1_000_000)
