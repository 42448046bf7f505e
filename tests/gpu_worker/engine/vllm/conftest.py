from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mell_gpu_worker.engine.options import EngineOptions
from mell_gpu_worker.engine.vllm.engine import VllmEngine, start_vllm_engine
from mell_shared.models import FAKE_MODEL
from tests.vllm_server import FakeVllm

StartEngine = Callable[..., VllmEngine]


@pytest.fixture
def server() -> Iterator[FakeVllm]:
    """A server that speaks as vLLM does."""
    with FakeVllm() as server:
        yield server


@pytest.fixture
def start_engine(server: FakeVllm) -> Iterator[StartEngine]:
    """Start engines before the server; they are closed at the end."""
    engines: list[VllmEngine] = []

    def start(**options: Any) -> VllmEngine:
        values = {"model": FAKE_MODEL, "vllm_url": server.url, "block_tokens": 0, "vllm_away_s": 0.0, **options}
        engines.append(start_vllm_engine(EngineOptions(engine="vllm", model_dir=Path(), **values)))
        server.seen.bodies.clear()
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()
