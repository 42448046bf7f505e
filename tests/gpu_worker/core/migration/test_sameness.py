"""A sequence that moved, however often, how, and when, gives the same text as one that never did."""

from collections.abc import Callable

import pytest

from .cluster import ALL_MODES, STEP_US, Cluster
from .links import BLOCK_US
from .network import LATENCY_US, MS_US

PROMPT = bytes(range(65, 91)) * 3
MODES = pytest.mark.parametrize("mode", ALL_MODES)


def move(cluster: Cluster, mode: str, name: str = "a") -> None:
    """Move a sequence to the other worker, and wait until it is there."""
    source, generation = cluster.owner(name)
    target = "w2" if source == "w1" else "w1"
    cluster.migrate(name, target, mode)
    cluster.run_until(lambda: cluster.owner(name)[0] != source or cluster.readers[name].done)
    assert cluster.owner(name) == (target, generation + 1), f"it did not move: {cluster.failed()}"


@MODES
@pytest.mark.parametrize("times", [1, 3, 10])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_moved_any_number_of_times(mode: str, times: int, temperature: float) -> None:
    """Greedy and seeded, back and forth; each move is proven, and each continues at its target."""
    cluster = Cluster(kv_blocks=60)
    reader = cluster.open("a", PROMPT, max_tokens=100, temperature=temperature, logprobs=1)
    for number in range(times):
        cluster.tokens(3 + 8 * number)
        move(cluster, mode)
    cluster.finish()
    assert len(cluster.committed()) == times
    assert cluster.frontend.stats.resubmissions == 0
    assert len(reader.ids) == 100


PHASES: dict[str, Callable[[Cluster], None]] = {
    "before its first step": lambda c: c.run_until(lambda: c.owner()[0] is not None and bool(_running(c))),
    "during prefill": lambda c: c.run_until(lambda: bool(_running(c)) and 0 < _running(c)[0].computed < len(PROMPT)),
    "at its first token": lambda c: c.tokens(1),
    "in the middle": lambda c: c.tokens(20),
    "close to its last": lambda c: c.tokens(22),
}


def _running(cluster: Cluster) -> list:
    return cluster.nodes["w1"].core.batcher.running


@MODES
@pytest.mark.parametrize("phase", PHASES)
def test_moved_in_any_phase(mode: str, phase: str) -> None:
    """Before its first step, in the middle of its prompt, at its first token, close to its last."""
    cluster = Cluster(max_step_tokens=16)
    cluster.open("a", PROMPT, max_tokens=40)
    PHASES[phase](cluster)
    move(cluster, mode)
    cluster.finish()
    assert len(cluster.committed()) == 1


@MODES
def test_ordered_to_move_at_any_step_it_ends_rightly(mode: str) -> None:
    """Whatever the step, and be it the last: it moves, or it ends where it was; never both, never neither."""
    outcomes = set()
    for tokens in range(1, 24):
        cluster = Cluster()
        cluster.open("a", b"short", max_tokens=24)
        cluster.tokens(tokens)
        cluster.migrate("a", "w2", mode)
        cluster.finish()
        reasons = [event.reason for event in cluster.failed()] + cluster.refused()
        outcomes.add(tuple(reasons))
        assert len(cluster.committed()) + len(reasons) == 1
        assert reasons in ([], ["ended"], ["superseded"], ["unknown"])
    assert () in outcomes, "it never moved"
    assert ("ended",) in outcomes, "it was never too late"


@MODES
def test_moved_under_load(mode: str) -> None:
    """Eight others on both workers decode on, none of them is disturbed, and three move at once."""
    cluster = Cluster(kv_blocks=300, max_step_tokens=16)
    cluster.place = lambda name: "w2" if name in {"s3", "s5", "s6"} else "w1"
    names = [f"s{number}" for number in range(8)]
    for number, name in enumerate(names):
        cluster.open(name, PROMPT[number:] if number % 2 else PROMPT, seed=number, max_tokens=60, logprobs=number % 3)
    for name in names:
        cluster.tokens(10, name)
    for name in ("s0", "s1", "s2"):
        cluster.migrate(name, "w2", mode)
    cluster.finish()
    assert {event.sequence for event in cluster.committed()} == {"s0", "s1", "s2"}, cluster.failed()
    assert cluster.frontend.stats.resubmissions == 0
    for node in cluster.nodes.values():
        assert node.core.batcher.preemptions == 0


@MODES
def test_what_the_target_has_already_is_not_sent(mode: str) -> None:
    """A prompt in its prefix cache is neither copied nor computed again."""
    cluster = Cluster(kv_blocks=60)
    cluster.place = lambda name: "w2" if name == "before" else "w1"
    cluster.open("before", PROMPT, max_tokens=4)
    cluster.finish()
    cluster.open("a", PROMPT, max_tokens=40)
    cluster.tokens(10)
    move(cluster, mode)
    cluster.finish()
    (committed,) = cluster.committed()
    assert cluster.links.copied_blocks <= 5
    assert committed.prefilled_tokens <= 16


@pytest.mark.parametrize("lost", [0, 1, 70])
def test_log_probabilities_the_frontend_has_not_accepted_come_from_the_target(lost: int) -> None:
    """Whatever the source published in vain comes again, with its log-probabilities: told, or made again."""
    cluster = Cluster(max_model_len=600, kv_blocks=60)
    reader = cluster.open("a", b"x", max_tokens=120, logprobs=2)
    cluster.tokens(10)
    dumb = [True]
    cluster.network.plan = lambda flight: "lose" if flight.what == "TokensGenerated" and dumb[0] else "deliver"
    outputs = cluster.nodes["w1"].core.streams.find("a", 1)
    cluster.run_until(lambda: outputs.outputs >= 10 + lost)
    # Between two statuses, so that nothing is asked for again before the move.
    cluster.migrate("a", "w2", "kv")
    cluster.run_until(lambda: cluster.owner()[0] == "w2" or reader.done)
    dumb[0] = False
    cluster.finish()
    assert len(cluster.committed()) == 1
    assert cluster.frontend.stats.resubmissions == 0


def test_preempted_between_claim_and_grant_it_goes_on_at_its_target() -> None:
    """A sequence that gave way to another before the frontend's word came is owned by its target all the same."""
    cluster = Cluster()
    cluster.place = lambda name: "w2" if name == "first" else "w1"
    cluster.open("first", PROMPT, priority=1, max_tokens=80)
    cluster.tokens(10, "first")
    cluster.open("a", PROMPT[::-1][:40], max_tokens=20)
    cluster.tokens(3)
    lost = iter(["lose"])
    cluster.network.plan = lambda flight: next(lost, "deliver") if flight.what == "Granted" else "deliver"
    cluster.migrate("a", "w2", "kv")
    batcher = cluster.nodes["w2"].core.batcher
    cluster.run_until(lambda: bool(batcher.waiting))
    assert batcher.waiting[0].unclaimed, "it was preempted too late to show anything"
    cluster.finish()
    assert len(cluster.committed()) == 1
    assert cluster.frontend.stats.resubmissions == 0


@MODES
def test_the_pause_is_short_whatever_the_length(mode: str) -> None:
    """One step, the last blocks, a commit, and what a round is late: as long for 40 tokens as for 400."""
    pauses = []
    for length in (40, 160, 400):
        cluster = Cluster(max_model_len=600, kv_blocks=150, max_step_tokens=64)
        cluster.open("a", bytes(number % 251 for number in range(length)), max_tokens=160)
        cluster.tokens(20)
        move(cluster, mode)
        cluster.finish()
        (committed,) = cluster.committed()
        assert committed.stopped_us == committed.tail_us + committed.claim_us + committed.first_step_us
        pauses.append(committed.stopped_us)
    assert max(pauses) <= 1.5 * STEP_US + 2 * BLOCK_US + 4 * LATENCY_US + 2 * MS_US, pauses
    assert max(pauses) - min(pauses) <= STEP_US, pauses


def test_whoever_got_all_kv_computes_only_the_last_token() -> None:
    """The blocks that were not full when the sequence stopped are sent too: the first step is a decode."""
    for tokens in range(5, 9):
        cluster = Cluster()
        cluster.open("a", PROMPT, max_tokens=40)
        cluster.tokens(tokens)
        move(cluster, "kv")
        cluster.finish()
        assert {count for _, _, count in cluster.nodes["w2"].computed} == {1}
        assert cluster.nodes["w2"].computed[0][1] == cluster.nodes["w1"].computed[-1][1] + 1


def test_only_the_owner_speaks_for_a_sequence() -> None:
    """Statuses list a sequence at its source while it stands still there, at its target from the grant on."""
    cluster = Cluster()
    cluster.open("a", PROMPT, max_tokens=40)
    cluster.tokens(5)
    cluster.network.plan = lambda flight: "delay" if flight.what == "Claim" else "deliver"
    cluster.migrate("a", "w2")
    source, target = cluster.nodes["w1"].core, cluster.nodes["w2"].core
    cluster.run_until(lambda: bool(target.batcher.newcomers))
    assert target.streams.frontends == ()
    status = source.streams.status("f1")
    assert (status.sequences, status.ended, status.next_indices) == (("a",), [0], [source.batcher.running[0].outputs])
    cluster.run_until(lambda: not source.moves.source.moving)
    assert source.streams.frontends == ()
    assert target.streams.status("f1").generations == [2]
    cluster.finish()
