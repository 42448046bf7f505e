"""Loads what a command needs when it is used, so that `mell --help` needs neither the services nor their extras."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


class MissingExtraError(Exception):
    """A package that an extra brings is not installed; the message says how to install it."""


@contextmanager
def needing(extra: str) -> Iterator[None]:
    """Turn the lack of a package that `extra` brings into a `MissingExtraError`.

    A module of ours that does not exist is a bug, never a missing extra, and raises as itself.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing.startswith("mell_"):
            raise
        raise MissingExtraError(f"{missing} is not installed: pip install 'mell[{extra}]'") from error


def load(module: str, extra: str) -> ModuleType:
    """Return the imported `module`; raises `MissingExtraError`."""
    with needing(extra):
        return importlib.import_module(module)
