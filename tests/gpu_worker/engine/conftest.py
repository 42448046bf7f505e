from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mell_gpu_worker.engine.options import EngineOptions
from mell_gpu_worker.engine.torch_engine import TorchEngine, load_torch_engine
from tests.gpu_worker.engine.families import FAMILIES, make_config, save_model

MakeEngine = Callable[..., TorchEngine]


@pytest.fixture(autouse=True, scope="session")
def _few_threads() -> None:
    """Tiny matrices run faster on one thread."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """Return the folder and the reference model of a family, made once."""
    made: dict[str, tuple[Path, Any]] = {}

    def get(family: str) -> tuple[Path, Any]:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            made[family] = folder, save_model(make_config(**FAMILIES[family]), folder)
        return made[family]

    return get


@pytest.fixture
def make_engine(tmp_path: Path) -> Iterator[MakeEngine]:
    """Build engines over a folder; they are closed at the end."""
    engines: list[TorchEngine] = []

    def make(folder: Path, **options: Any) -> TorchEngine:
        values = {"kv_blocks": 96, "block_tokens": 4, "threads": 1, **options}
        engine = load_torch_engine(EngineOptions(engine="torch", model=str(folder), model_dir=tmp_path, **values))
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()
