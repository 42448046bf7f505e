"""Where model folders lie: a model is named by a store name, a local folder or a hub id."""

from pathlib import Path

FAKE_MODEL = "fake"
"""The `fake` engine's model: no weights; its tokens are bytes 0 to 255, 256 begins and 257 ends a sequence."""
FAKE_VOCAB_SIZE = 258
FAKE_BOS_ID = 256
FAKE_EOS_ID = 257

DEFAULT_MODEL = "smollm2-135m"


class ModelNotFoundError(Exception):
    """No folder holds the model; the message says how to get it."""


def default_model_dir() -> Path:
    """Return the folder that pulled models are kept in unless `MELL_MODEL_DIR` says otherwise."""
    return Path.home() / ".cache" / "mell" / "models"


def folder_name(model: str) -> str:
    """Return the store's folder name for a store name or hub id (`org/name` becomes `org--name`)."""
    return model.replace("/", "--")


def locate_model(model: str, model_dir: Path) -> Path:
    """Return the folder that holds `model`'s config, tokenizer and weights.

    A path that is a folder wins, then `model_dir`. Raises `ModelNotFoundError`.
    """
    for folder in (Path(model).expanduser(), model_dir / folder_name(model)):
        if (folder / "config.json").is_file():
            return folder
    raise ModelNotFoundError(f"model {model!r} is neither a folder nor in {model_dir}; run: mell model pull {model}")
