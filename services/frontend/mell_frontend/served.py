"""The models that this frontend serves: each its public name, vocabulary, chat template and context."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mell_frontend.chat_template import FAKE_TEMPLATE, ChatTemplate, TemplateFaultError, load_chat_template
from mell_frontend.tokenizer import ByteTokenizer, FolderTokenizer, Tokenizer, TokenizerError
from mell_shared.models import FAKE_MODEL, ModelNotFoundError, locate_model


class ModelLoadError(Exception):
    """A model's folder cannot be served; the message says what to do."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One model: `name` to clients and to the workers, `model` where its folder is looked for.

    `template` is None for a model that cannot chat; `max_model_len` None if only the workers know it.
    """

    name: str
    model: str
    tokenizer: Tokenizer
    template: ChatTemplate | None
    max_model_len: int | None


def load_models(entries: Sequence[str], model_dir: Path, max_model_len: int | None = None) -> list[ServedModel]:
    """Return the models of `entries` (`MODEL` or `NAME=MODEL`); raises `ModelLoadError` in one line."""
    models = [_load(*_names(entry), model_dir, max_model_len) for entry in entries]
    names = [model.name for model in models]
    for name in names:
        if names.count(name) > 1:
            raise ModelLoadError(f"two models are to be served as {name!r}; name one with NAME=MODEL")
    return models


def _names(entry: str) -> tuple[str, str]:
    name, separator, model = entry.partition("=")
    if not separator:
        return entry, entry
    if not name or not model:
        raise ModelLoadError(f"{entry!r} is not a model; write MODEL or NAME=MODEL")
    return name, model


def _load(name: str, model: str, model_dir: Path, max_model_len: int | None) -> ServedModel:
    if model == FAKE_MODEL:
        return ServedModel(name, model, ByteTokenizer(), ChatTemplate(FAKE_TEMPLATE, {}), max_model_len)
    try:
        folder = locate_model(model, model_dir)
        tokenizer, template = FolderTokenizer(folder), load_chat_template(folder)
        context = max_model_len or _context(json.loads((folder / "config.json").read_bytes()))
    except (ModelNotFoundError, TokenizerError, TemplateFaultError) as error:
        raise ModelLoadError(str(error)) from error
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"model {model!r} cannot be read: {error}; run: mell model pull {model}") from error
    return ServedModel(name, model, tokenizer, template, context)


def _context(config: Any) -> int | None:
    """Return the context in tokens that a transformers config states, under any of the names in use."""
    if not isinstance(config, dict):
        return None
    for part in (config, config.get("text_config") or {}):
        for key in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx"):
            if isinstance(part.get(key), int):
                return int(part[key])
    return None
