import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from tests.cluster.faults.rows import told
from tests.cluster.faults.scene import Scene, worker_id
from tests.cluster.stack import Service, eventually

pytestmark = pytest.mark.connected

CLIENTS = 6


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """A whole stack as users have it, of three workers, to be restarted piece by piece."""
    with Scene(tmp_path_factory.mktemp("rolling"), MELL_WORKER_SILENCE_S="60", MELL_FRONTEND_SILENCE_S="60") as scene:
        scheduler = scene.stack.start_scheduler()
        scene.well = [scene.worker(f"worker-{n}") for n in range(3)]
        scene.serve(scheduler, *scene.well)
        scene.schedulers = [scheduler]
        yield scene


def drained(stage: Scene, worker: Service) -> None:
    """As an operator does it: `mell drain`, wait until it is empty, SIGTERM."""
    assert stage.frontend is not None
    environment = os.environ | {"MELL_URL": stage.frontend.ready()["url"]}
    flags = ["--deadline", "60s", "--wait", "--timeout", "90s", "--json"]
    command = [sys.executable, "-m", "mell_console", "drain", worker_id(worker), *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr + done.stdout
    assert json.loads(done.stdout)
    worker.ask_to_stop()


def told_to_stop(stage: Scene, worker: Service) -> None:
    """As a container's runtime does it: SIGTERM."""
    del stage
    worker.ask_to_stop()


@pytest.mark.parametrize(
    ("how", "name"),
    [
        pytest.param(drained, "mell drain, SIGTERM", id="drain"),
        pytest.param(told_to_stop, "SIGTERM", id="SIGTERM", marks=pytest.mark.reliability),
    ],
)
def test_all_is_restarted_one_after_the_other(stage: Scene, how: Callable[[Scene, Service], None], name: str) -> None:
    """Workers, then the scheduler, under load: no request is dropped, none is begun twice, no text differs."""
    assert stage.frontend is not None
    before = len(stage.frontend.events("sequence_placed_again"))
    with stage.crowd(CLIENTS) as crowd:
        for number, worker in enumerate(stage.well):
            eventually(lambda: crowd.well() and stage.serving() == len(stage.well), "all serve")
            how(stage, worker)
            assert worker.exit_code() == 0, worker.lines()[-5:]
            stage.well[number] = stage.worker(f"worker-{number}")
            stage.well[number].ready()
        old, new = stage.schedulers[-1], stage.stack.start_scheduler()
        stage.schedulers.append(new)
        assert new.ready()["role"] == "standby"
        old.ask_to_stop()
        assert old.exit_code() == 0
        crowd.answered_anew()
    placed_again = stage.frontend.events("sequence_placed_again")[before:]
    # What was on its way to a worker as it began to drain is refused there, and goes to the next.
    begun_again = [event for event in placed_again if not event["why"].endswith("refused it: stopping")]
    assert not begun_again, begun_again
    told("restart", name, "each worker, then the scheduler", "nothing", __name__, crowd)
    stage.nothing_left()
