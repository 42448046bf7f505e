import pytest

from mell_console.scaler.values import StartWorkers
from mell_console.up.scale import names_to_start

PLACES = ["worker-1", "worker-2", "worker-3", "worker-4"]


@pytest.mark.parametrize(
    ("count", "names", "there", "started"),
    [
        (2, ["worker-2"], ["worker-1"], ["worker-2"]),
        (4, ["worker-2", "worker-3", "worker-4"], ["worker-1"], ["worker-2", "worker-3", "worker-4"]),
        (2, ["worker-2"], ["worker-1", "worker-2"], []),
        (3, ["worker-2"], ["worker-1", "worker-2"], ["worker-3"]),
        (2, ["worker-1"], ["worker-2"], ["worker-1"]),
        (2, ["worker-9"], ["worker-1"], ["worker-2"]),
        (1, ["worker-2"], ["worker-1", "worker-3"], []),
        (9, ["worker-5"], PLACES, []),
    ],
    ids=[
        "one more",
        "three more",
        "ordered twice",
        "one died that the scheduler has forgotten",
        "the first place is free",
        "a name without a place",
        "more are there than ordered",
        "no place is left",
    ],
)
def test_the_count_decides_who_is_started(count: int, names: list[str], there: list[str], started: list[str]) -> None:
    """Names are a wish; there are never more than ordered, and never one twice."""
    assert names_to_start(StartWorkers(count, tuple(names)), PLACES, there) == started
