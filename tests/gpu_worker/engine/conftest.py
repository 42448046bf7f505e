import json
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
        values = {"kv_blocks": 96, "block_tokens": 4, "threads": 1, "compile": "off", **options}
        engine = load_torch_engine(EngineOptions(engine="torch", model=str(folder), model_dir=tmp_path, **values))
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tokenizer of 256 bytes, <begin> 256, <end> 257, <more> 258."""
    letters = _byte_letters()
    special = {"<begin>": 256, "<end>": 257, "<more>": 258}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": content, **flags} for content, i in special.items()],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {**{letters[i]: i for i in range(256)}, **special}, "merges": []},
    }
    folder = tmp_path_factory.mktemp("byte_tokenizer")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    configuration = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<begin>", "eos_token": "<end>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(configuration))
    return folder


def _byte_letters() -> list[str]:
    """Return the letters by which byte-level tokenizers write bytes (A. Radford et al., GPT-2, 2019)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in printable)
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + place) for place, byte in enumerate(others)}
    return [letters[byte] for byte in range(256)]
