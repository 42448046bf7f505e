from pathlib import Path

import pytest

from mell_scheduler.core.journal import JournalError, header_line, replay
from mell_scheduler.core.values import CoreSettings
from mell_scheduler.policy import PolicySettings, check_policy, make_policy
from mell_scheduler.policy.base import GpuSpec, Item, Reason
from mell_scheduler.settings import SchedulerSettings

EXAMPLES = Path(__file__).parents[3] / "examples"
NAME = "two_choices:TwoChoices"


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Find the examples as PYTHONPATH=examples does."""
    monkeypatch.syspath_prepend(str(EXAMPLES))


def test_a_rule_of_ones_own_is_a_policy() -> None:
    """It places by its own preference, keeps the protocol's invariants, and relieves an overload."""
    policy = make_policy(NAME, PolicySettings(hold_both_ends=False))
    for gpu in ("a", "b", "c"):
        policy.add_gpu(GpuSpec(gpu, 100))
    for number in range(9):
        assert policy.allocate(Item(f"item-{number}", 30)) is not None
        policy.check()
    assert policy.allocate(Item("late", 30)) is None
    assert policy.name == NAME
    first = policy.items_on("a")
    policy.depart(policy.items_on("b")[0])
    policy.update(first[0], 45)
    [move] = policy.epoch(0)
    assert (move.source, move.target, move.reason) == ("a", "b", Reason.OVERLOAD)
    policy.check()


def test_the_scheduler_takes_its_name() -> None:
    """As a setting, like the names of ours."""
    assert SchedulerSettings(policy=NAME).policy == NAME


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such_module:Rule", "no policy at .*PYTHONPATH"),
        ("two_choices:NoSuch", "no policy at .*NoSuch"),
        (":Rule", "no policy at"),
        ("two_choices:__doc__", "makes no policy: str"),
        ("magic", "unknown policy 'magic': choose one of .*repack.* or module:class"),
    ],
)
def test_what_is_no_policy_says_why(name: str, words: str) -> None:
    """One line, before anything starts."""
    with pytest.raises(ValueError, match=words):
        check_policy(name)


def test_a_journal_loads_no_code() -> None:
    """What is read from a file names policies of ours only."""
    header = header_line(NAME, PolicySettings(), CoreSettings())
    with pytest.raises(JournalError, match="loads no code"):
        list(replay([header]))
