"""The scene that the faults of one file share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.faults.scene import Scene

_MOST_S = 600
"""Of one test with its scene: half a dozen processes start, which on a busy machine takes minutes."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give the tests of this folder their time."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.timeout(_MOST_S))


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """A broker, a scheduler that moves nothing by itself, a frontend and two workers that nothing happens to."""
    with Scene(tmp_path_factory.mktemp("faults")) as scene:
        scheduler = scene.stack.start_scheduler("--policy", "best-fit")
        scene.well = [scene.worker(f"well-{n}", "--stop-deadline-s", "5") for n in (1, 2)]
        scene.schedulers = [scheduler]
        scene.serve(scheduler, *scene.well)
        yield scene
