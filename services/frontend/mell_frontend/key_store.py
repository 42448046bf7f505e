"""The API keys in force: from the settings and from a file, which is read again when it changes."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

import structlog

from mell_frontend.keys import ApiKey, KeyRing, KeysFileError, keys_from_values, parse_keys

_LOOK_S = 1.0
_Stamp = tuple[int, int, int]


class KeyStore:
    """Holds the ring that counts now; `ring` is None where no keys are asked for.

    A file that cannot be read, or has a fault, changes nothing: the keys read before stay in force. Raises
    `KeysFileError` if it is so at the start.
    """

    def __init__(self, values: Sequence[str], path: Path | None = None) -> None:
        self._values = keys_from_values(values)
        self._path = path
        self._stamp: _Stamp | None = None
        self._listeners: list[Callable[[Sequence[ApiKey]], None]] = []
        self.ring: KeyRing | None = None
        if path is not None:
            self._stamp = _stamp(path)
            self._take(_read(path))
        elif self._values:
            self._take([])

    def on_change(self, listener: Callable[[Sequence[ApiKey]], None]) -> None:
        """Call `listener` with all keys now, and whenever they change."""
        self._listeners.append(listener)
        listener(self.ring.keys if self.ring is not None else [])

    async def watch(self) -> None:
        """Look at the file every second, for ever; returns at once if there is none."""
        while self._path is not None:
            await asyncio.sleep(_LOOK_S)
            self.look()

    def look(self) -> None:
        """Read the file again if it was changed or replaced; says once what is wrong with it."""
        if self._path is None:
            return
        log = structlog.get_logger()
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._take(_read(self._path))
        except KeysFileError as error:
            log.error("keys_not_read", why=str(error))  # noqa: TRY400 - the line says it all
        else:
            log.info("keys_read", keys=len(self.ring or ()))

    def _take(self, from_file: Sequence[ApiKey]) -> None:
        # Limits go by name: two keys of one name would share them.
        doubled = {key.name for key in from_file} & {key.name for key in self._values}
        if doubled:
            what = f"the name {min(doubled)!r} belongs to a key of the settings"
            raise KeysFileError(f"the keys file {self._path}: {what}")
        self.ring = KeyRing([*self._values, *from_file])
        for listener in self._listeners:
            listener(self.ring.keys)


def _stamp(path: Path) -> _Stamp | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _read(path: Path) -> list[ApiKey]:
    try:
        return parse_keys(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise KeysFileError(f"cannot read the keys file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise KeysFileError(f"the keys file {path} is no UTF-8 text") from error
    except KeysFileError as error:
        raise KeysFileError(f"the keys file {path}: {error}") from error
