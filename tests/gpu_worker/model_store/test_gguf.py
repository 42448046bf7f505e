from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mell_gpu_worker.model_store import ModelStoreError
from mell_gpu_worker.model_store.gguf import convert_gguf
from tests.gpu_worker.model_store.tiny_gguf import tiny_llama, tokens, write_gguf


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, list[float]]:
    """Return the original model, the folder made from its GGUF file, and the progress told."""
    folder = tmp_path_factory.mktemp("gguf")
    model, told = tiny_llama(), list[float]()
    write_gguf(model, folder / "tiny.gguf")
    target = folder / "model"
    target.mkdir()
    convert_gguf(folder / "tiny.gguf", target, told.append)
    return model, target, told


def test_a_converted_model_has_the_originals_logits(converted: tuple[Any, Path, list[float]]) -> None:
    """Weights, their order within heads and the configuration survive the way through GGUF."""
    model, folder, _ = converted
    load: Callable[..., Any] = AutoModelForCausalLM.from_pretrained
    again = load(folder, dtype=torch.float32)
    ids = torch.tensor([[5, 17, 60, 3, 99, 41, 7]])
    with torch.inference_mode():
        torch.testing.assert_close(again(ids).logits, model(ids).logits)


def test_the_tokenizer_splits_digits_and_knows_its_specials(converted: tuple[Any, Path, list[float]]) -> None:
    """Merges apply but never to digits; special tokens are one id; text survives; the chat template is there."""
    tokenizer: Any = AutoTokenizer.from_pretrained(converted[1])
    pieces = [tokens()[i] for i in tokenizer.encode("hello 12<end>")]
    assert pieces == ["h", "e", "llo", "Ġ", "1", "2", "<end>"]
    assert tokenizer.decode(tokenizer.encode("hello 12")) == "hello 12"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert chat == "<start>hello<end>"


def test_progress_is_a_growing_fraction(converted: tuple[Any, Path, list[float]]) -> None:
    """What is told starts at 0, only grows and stays below 1."""
    told = converted[2]
    assert told[0] == 0
    assert told == sorted(told)
    assert told[-1] < 1


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    """A GGUF file that is not a llama model is refused by name."""
    writer: Any = gguf.GGUFWriter(tmp_path / "other.gguf", "bert")
    writer.add_tokenizer_model("bert")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelStoreError, match="holds a bert model; only llama is converted"):
        convert_gguf(tmp_path / "other.gguf", tmp_path, lambda _: None)
