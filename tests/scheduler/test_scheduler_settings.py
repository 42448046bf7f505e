import pytest

from mell_scheduler.core import CoreSettings
from mell_scheduler.policy import PolicySettings
from mell_scheduler.settings import SchedulerSettings


def test_the_defaults_are_the_cores() -> None:
    """One truth about defaults: what the core assumes is what the service sets, but that only scripts are punctual."""
    assert SchedulerSettings().core_settings() == CoreSettings(report_late_us=200_000, plan_late_us=100_000)
    policy = PolicySettings(fixed_head_room=0.1, cooldown_epochs=5, max_moves_per_epoch=32)
    assert SchedulerSettings().policy_settings() == policy


def test_flags_reach_the_core() -> None:
    """Seconds and milliseconds become microseconds."""
    flags = "--queue-hold-s 0.5 --tpot-target-ms 80 --queue-limit 7 --worker-lost-s 20 --head-room 0 --policy worst-fit"
    settings = SchedulerSettings.from_command_line(flags.split())
    core = settings.core_settings()
    assert (core.queue_hold_us, core.tpot_target_us, core.queue_limit) == (500_000, 80_000, 7)
    assert (core.worker_lost_us, settings.policy_settings().fixed_head_room, settings.policy) == (
        20_000_000,
        0,
        "worst-fit",
    )


def test_moves_have_their_settings() -> None:
    """Megabytes become bytes, and no limit on bytes is more than any epoch needs."""
    flags = "--epoch-s 2 --link-mb-per-s 1250 --moving-head-room 0.05 --max-move-mb-per-epoch 2.5 --step-base-us 9"
    flags += " --max-growth-tokens 40"
    settings = SchedulerSettings.from_command_line(flags.split())
    core = settings.core_settings()
    assert (core.epoch_us, core.link_bytes_per_s, core.step_base_ns) == (2_000_000, 1_250_000_000, 9_000)
    assert core.growth_limit_tokens == 40
    assert (core.max_move_bytes_per_epoch, settings.policy_settings().head_room) == (2_500_000, 0.05)
    assert SchedulerSettings().core_settings().max_move_bytes_per_epoch > 10**15


def test_variables_reach_the_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every setting has its `MELL_` variable."""
    monkeypatch.setenv("MELL_SUBMIT_TIMEOUT_S", "2.5")
    assert SchedulerSettings.from_command_line([]).core_settings().submit_timeout_us == 2_500_000


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--policy worst", "--policy (or MELL_POLICY)"),
        ("--queue-limit 0", "--queue-limit (or MELL_QUEUE_LIMIT)"),
        ("--head-room 1", "--head-room (or MELL_HEAD_ROOM)"),
        ("--queue-hold-s 1.9", "--queue-hold-s (or MELL_QUEUE_HOLD_S)"),
        ("--queue-renew-s 0.5", "queue_renew_s (0.5) must be over queue_hold_s (0.8)"),
        ("--worker-lost-s 2", "worker_lost_s (2.0) must be over three report intervals (3.0)"),
    ],
)
def test_a_wrong_setting_is_said_in_one_line(flags: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The line names the flag; the exit code is 2."""
    with pytest.raises(SystemExit) as exited:
        SchedulerSettings.from_command_line(flags.split())
    assert exited.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
