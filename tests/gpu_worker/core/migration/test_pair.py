"""Two real workers and the real arbiter: every single message and transfer of a move is disturbed, one at a time."""

import pytest

from .cluster import WAYS, Cluster
from .network import Verdict, disturb, undisturbed

# A thousand runs of what other tests visit once: tracing them would only cost time.
pytestmark = pytest.mark.no_cover

DISTURBANCES: tuple[Verdict, ...] = (
    "lose",
    "repeat",
    "delay",
    "delay long",
    "cut",
    "corrupt",
    "kill sender",
    "kill receiver",
)

ONLY_IDS = {"tokens", "kv, fetched"}
"""Ways without a transfer that could be cut."""
LINK_FAULTS = {"cut", "corrupt"}
"""Of transfers: a message that is cut off or damaged is one that is lost."""


def moved(way: str, verdicts: dict[int, Verdict], **sampling: int) -> Cluster:
    """Serve one client whose sequence is moved in the middle."""
    mode, workers = WAYS[way]
    cluster = Cluster(disturb(verdicts) if verdicts else undisturbed, **workers)
    cluster.open(**sampling)
    cluster.tokens(5)
    cluster.migrate("a", "w2", mode)
    cluster.finish()
    return cluster


def flights(way: str, verdict: Verdict) -> list[int]:
    """The numbers of all flights from the order to move until the end that can be disturbed so."""
    mode, workers = WAYS[way]
    cluster = Cluster(**workers)
    cluster.open()
    cluster.tokens(5)
    first = len(cluster.network.flights)
    cluster.migrate("a", "w2", mode)
    cluster.finish()
    assert len(cluster.committed()) == 1, "it did not move"
    transfers = {"OpenLink", "SendBlocks"}
    hit = [f.number for f in cluster.network.flights[first:] if verdict not in LINK_FAULTS or f.what in transfers]
    assert hit, "nothing can be disturbed so"
    return hit


@pytest.mark.parametrize("way", WAYS)
def test_an_undisturbed_move_is_not_noticed(way: str) -> None:
    """The text is the same, the sequence runs at its target, nothing stays behind, nothing was made twice."""
    cluster = moved(way, {})
    (committed,) = cluster.committed()
    assert (committed.worker, committed.source, committed.generation) == ("w2", "w1", 2)
    assert not cluster.failed()
    assert cluster.frontend.stats.resubmissions == 0
    assert cluster.frontend.stats.resends == 0
    assert committed.mode == WAYS[way][0]
    assert (cluster.links.copied_blocks > 0) == (way not in ONLY_IDS)


@pytest.mark.parametrize(
    ("way", "verdict"),
    [(w, v) for w in WAYS for v in DISTURBANCES if w not in ONLY_IDS or v not in LINK_FAULTS],
)
def test_whatever_happens_to_any_one_message_the_text_is_right(way: str, verdict: Verdict) -> None:
    """Lost, repeated, late, cut, damaged, or the end of either side: right text, once, and no block missing."""
    for number in flights(way, verdict):
        try:
            cluster = moved(way, {number: verdict})
        except AssertionError as error:
            raise AssertionError(f"{verdict} at flight {number} of a move by {way}") from error
        assert len(cluster.committed()) <= 1
