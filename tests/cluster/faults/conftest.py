"""The scene that the faults of one file share."""

from collections.abc import Iterator

import pytest

from tests.cluster.faults.scene import Scene


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """A broker, a scheduler that moves nothing by itself, a frontend and two workers that nothing happens to."""
    with Scene(tmp_path_factory.mktemp("faults")) as scene:
        scheduler = scene.stack.start_scheduler("--policy", "best-fit")
        scene.well = [scene.worker(f"well-{n}", "--stop-deadline-s", "5") for n in (1, 2)]
        scene.schedulers = [scheduler]
        scene.serve(scheduler, *scene.well)
        yield scene
