"""The simulated cluster: seeds of the suite, what they meet on the way, repetition, reduction, replay."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from mell_frontend.stream.sequence import Sequence as Stream
from tests.cluster.simulation.chance import Chance
from tests.cluster.simulation.clock import SECOND_US, EventQueue, LocalClock
from tests.cluster.simulation.faults import Shove
from tests.cluster.simulation.play import play, reduce, report
from tests.cluster.simulation.scenario import draw
from tests.cluster.simulation.simulation import Simulation

SEEDS = 50
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("seed", range(SEEDS))
def test_nothing_is_lost(seed: int) -> None:
    """Whatever goes wrong: right tokens once and in order, nothing leaked, everything at rest in the end."""
    failure = play(draw(seed))
    if failure is not None:
        pytest.fail(report(reduce(failure, most_runs=40)), pytrace=False)


def test_the_seeds_meet_what_they_are_meant_to() -> None:
    """A simulation in which the rare things do not happen proves nothing about them."""
    wanted = {
        "AskResend", "CancelSequence", "ConnectionLost", "LeadershipEnded", "Queued", "Evicted",
        "Claim", "AbortMigration", "Granted", "CommitGranted", "MigrationCommitted", "MigrationFailed", "KvRefused",
        "LinkFailed", "CaughtUp", "ReleaseKv", "StatusUnanswered", "WorkerLeft", "blocks sent",
    }  # fmt: skip
    met: Counter[str] = Counter()
    for seed in range(SEEDS):
        simulation = Simulation(draw(seed))
        simulation.run()
        for line in simulation.judge.story.lines:
            met.update(type(value).__name__ for value in (line.event, *line.commands))
            met.update(_kinds(line.event, *line.commands))
        met["blocks sent"] += simulation.links.sent_blocks
        if wanted <= set(+met):
            return
    pytest.fail(f"never met: {sorted(wanted - set(+met))}")


def _kinds(*values: object) -> list[str]:
    inner = [getattr(value, name, None) for value in values for name in ("message", "reply", "command")]
    return [type(value).__name__ for value in inner if value is not None]


def test_a_seed_is_the_same_run_in_every_process() -> None:
    """Neither the order of sets nor anything else that a process draws by itself gets into a run."""
    script = (
        "from tests.cluster.simulation.scenario import draw\n"
        "from tests.cluster.simulation.simulation import Simulation\n"
        "simulation = Simulation(draw(11)); simulation.run()\n"
        "print('\\n'.join(simulation.judge.story.tell()))\n"
    )
    told = [
        subprocess.run(
            [sys.executable, "-c", script], env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": _path()},
            cwd=ROOT, capture_output=True, text=True, check=True,
        ).stdout
        for hash_seed in ("1", "2")
    ]  # fmt: skip
    assert told[0] == told[1]
    assert len(told[0].splitlines()) > 500


def _path() -> str:
    return ":".join([str(ROOT), *(path for path in sys.path if path)])


def test_a_failing_seed_is_reduced_to_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The story names the seed, how to see it again, and only what is needed for it to fail."""
    monkeypatch.setattr(Stream, "raise_generation", lambda _: None)
    failure = next(failure for seed in range(20) if (failure := play(draw(seed))) is not None)
    reduced = reduce(failure, most_runs=60)
    assert len(reduced.faults) <= 3
    assert len(reduced.wishes) <= 3
    assert reduced.failure.place == failure.place
    told = report(reduced)
    assert f"replay {failure.scenario.seed} --faults" in told
    assert "belongs to" in told


def test_a_replay_of_some_faults_is_the_same_run() -> None:
    """Taking a fault out leaves the fate of all messages that it does not touch as it was."""
    whole = draw(3)
    calm = whole.only([], list(range(len(whole.wishes))))
    one, other = Simulation(calm), Simulation(calm)
    one.run()
    other.run()
    assert list(one.judge.story.tell()) == list(other.judge.story.tell())


def test_the_command_replays_a_seed() -> None:
    """`python -m tests.cluster.simulation replay SEED` says that all is well, or tells the story."""
    command = [sys.executable, "-m", "tests.cluster.simulation", "replay", "3", "--faults", "none", "--wishes", "0,1"]
    done = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": _path()}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "seed 3: all is well\n"), done.stderr


def test_an_undisturbed_cluster_loses_and_refuses_nothing() -> None:
    """Without faults every request that can fit ends by itself, and moves that are ordered succeed."""
    whole = draw(5)
    moves = [number for number, fault in enumerate(whole.faults) if isinstance(fault, Shove)]
    simulation = Simulation(whole.only(moves, list(range(len(whole.wishes)))))
    simulation.run()
    ends = {reader.end.partition(":")[0] for reader in simulation.judge.readers.values()}
    assert ends <= {"length", "stop", "left", "failed"}


def test_chance_depends_on_its_name_and_seed_alone() -> None:
    """The order of questions does not matter."""
    one, other = Chance(7), Chance(7)
    first = [one.number("a", 1), one.number("b", 2)]
    assert [other.number("b", 2), other.number("a", 1)] == first[::-1]
    assert Chance(8).number("a", 1) != first[0]
    assert {one.between(2, 4, "x", number) for number in range(100)} == {2, 3, 4}
    assert not one.happens(0.0, "never")


def test_what_is_due_together_happens_in_the_order_it_was_put() -> None:
    """And what is put for the past happens now."""
    queue, seen = EventQueue(), list[int]()
    queue.at(5, lambda: seen.append(1))
    queue.at(5, lambda: queue.at(2, lambda: seen.append(3)))
    queue.at(5, lambda: seen.append(2))
    while queue.step():
        pass
    assert (seen, queue.now_us) == ([1, 2, 3], 5)


def test_a_fast_clocks_timer_is_never_early() -> None:
    """After the real time that a local span takes, the local clock shows at least that span."""
    queue = EventQueue()
    for drift_ppm in (-500, 0, 500):
        clock = LocalClock(queue, 10**12, drift_ppm)
        before_us = clock.now_us()
        queue.now_us += clock.real_us(10 * SECOND_US)
        assert 0 <= clock.now_us() - before_us - 10 * SECOND_US < 100
