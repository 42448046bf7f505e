import pytest

from mell_console.up.settings import UpSettings
from mell_console.up.specs import Launch
from mell_console.up.worker_range import bounds


@pytest.mark.parametrize(("text", "least", "most"), [("2", 2, 2), ("1..4", 1, 4), (" 3..3 ", 3, 3), ("256", 256, 256)])
def test_a_number_or_a_range_is_read(text: str, least: int, most: int) -> None:
    """A range says the least and the most."""
    assert bounds(text) == (least, most)


@pytest.mark.parametrize("text", ["", "0", "0..4", "4..1", "1..257", "-1", "1-4", "1...4", "two", "1..4..8", "1.5"])
def test_what_is_neither_says_what_to_write(text: str) -> None:
    """One line, with an example."""
    with pytest.raises(ValueError, match=r"1\.\.4|1 to 256"):
        bounds(text)


def test_the_flag_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """As every other flag."""
    with pytest.raises(SystemExit):
        UpSettings.from_command_line(["--workers", "four"])
    assert capsys.readouterr().err.count("\n") == 1


def test_limits_are_the_flags() -> None:
    """Seconds become microseconds; a single number is no range."""
    settings = UpSettings(workers="1..4", scale_up_s=0.5, scale_down_s=7, scale_cooldown_s=2, spare_workers=1)
    limits = settings.scale_limits()
    assert (limits.least, limits.most, limits.spare) == (1, 4, 1)
    assert (limits.up_us, limits.down_us, limits.cooldown_us) == (500_000, 7_000_000, 2_000_000)
    assert settings.scales
    assert not UpSettings(workers="4").scales


@pytest.mark.parametrize(
    ("workers", "given", "seen"), [("1..4", None, "0"), ("1..4", "9", "9"), ("4", None, None), ("4", "9", "9")]
)
def test_a_line_may_be_longer_where_workers_come_on_demand(workers: str, given: str | None, seen: str | None) -> None:
    """The scheduler's bound on waiting is raised, unless the user has set it."""
    environment = {} if given is None else {"MELL_QUEUE_WAIT_S": given}
    launch = Launch(UpSettings(workers=workers), "python", environment, "nats://x", 8000)
    assert launch.scheduler().environment.get("MELL_QUEUE_WAIT_S") == seen
