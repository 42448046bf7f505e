"""Keys that clients present: known here only by their digests, compared in constant time; the file they stand in."""

import hashlib
import hmac
import secrets
import tomllib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

_DIGEST_PREFIX = "sha256:"
_MAX_FILE_CHARS = 16 * 2**20

KeyName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
Rate = Annotated[int, Field(ge=1, lt=2**31)]


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One key: its name in logs and errors, its SHA-256 digest, its own limits (None: the general ones)."""

    name: str
    digest: bytes
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


class KeysFileError(Exception):
    """The keys cannot be read; the message is one line that says what is wrong."""


def new_key() -> str:
    """Return a fresh key. It has 256 random bits, so that a plain digest of it gives nothing away."""
    return f"sk-{secrets.token_urlsafe(32)}"


def key_digest(key: bytes) -> bytes:
    """Return what is kept of a key: 32 bytes."""
    return hashlib.sha256(key).digest()


def presented_key(authorization: bytes | None) -> bytes | None:
    """Return the key of an `Authorization: Bearer KEY` header; None if it is none."""
    scheme, _, key = (authorization or b"").partition(b" ")
    key = key.strip()
    return key if scheme.lower() == b"bearer" and key else None


class KeyRing:
    """The keys that are right; an empty one lets nobody in.

    They are found by their digests, keyed with a secret of this process: how long a search takes depends on a value
    that nobody outside can know or choose, and not on how many keys there are.
    """

    def __init__(self, keys: Iterable[ApiKey]) -> None:
        self._secret = secrets.token_bytes(32)
        self._by_blinded = {self._blinded(key.digest): key for key in keys}

    def __len__(self) -> int:
        return len(self._by_blinded)

    @property
    def keys(self) -> Sequence[ApiKey]:
        """All of them."""
        return list(self._by_blinded.values())

    def find(self, authorization: bytes | None) -> ApiKey | None:
        """Return the key that an `Authorization` header presents, None if it is not one of these."""
        presented = presented_key(authorization)
        digest = key_digest(presented or b"")
        found = self._by_blinded.get(self._blinded(digest))
        right = found is not None and hmac.compare_digest(found.digest, digest)
        return found if right and presented is not None else None

    def _blinded(self, digest: bytes) -> bytes:
        return hmac.digest(self._secret, digest, "sha256")


def keys_from_values(values: Sequence[str], name: str = "key") -> list[ApiKey]:
    """Return the keys of a setting, each as it is or as `sha256:HEX`; called NAME-1, NAME-2, and so on.

    Raises `KeysFileError`.
    """
    return [
        ApiKey(f"{name}-{position}", _digest_of(value, f"{name} {position}"))
        for position, value in enumerate(values, start=1)
    ]


def _digest_of(value: str, what: str) -> bytes:
    if not value.startswith(_DIGEST_PREFIX):
        return key_digest(value.encode())
    try:
        digest = bytes.fromhex(value.removeprefix(_DIGEST_PREFIX))
    except ValueError:
        digest = b""
    if len(digest) != hashlib.sha256().digest_size:
        raise KeysFileError(f"{what}: after {_DIGEST_PREFIX} come 64 hexadecimal digits")
    return digest


class _Entry(BaseModel):
    """One `[[keys]]` of a keys file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: KeyName
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9A-Fa-f]{64}$")]
    requests_per_minute: Rate | None = None
    tokens_per_minute: Rate | None = None

    def key(self) -> ApiKey:
        return ApiKey(self.name, bytes.fromhex(self.sha256), self.requests_per_minute, self.tokens_per_minute)


class _File(BaseModel):
    """A whole keys file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    keys: list[_Entry] = []


def parse_keys(text: str) -> list[ApiKey]:
    """Return the keys of a keys file (TOML, a table `[[keys]]` for each); raises `KeysFileError`."""
    if len(text) > _MAX_FILE_CHARS:
        raise KeysFileError(f"longer than {_MAX_FILE_CHARS} characters")
    try:
        entries = _File.model_validate(tomllib.loads(text)).keys
    except ValidationError as error:
        raise KeysFileError(_fault(error)) from None  # the cause quotes what may be a key
    except (ValueError, RecursionError) as error:  # tomllib lets through those of endless numbers and deep lists
        raise KeysFileError(f"no TOML: {error}") from error
    _check_unique("name", [entry.name for entry in entries])
    _check_unique("sha256", [entry.sha256.lower() for entry in entries])
    return [entry.key() for entry in entries]


def show_entry(name: str, key: str, requests_per_minute: int | None, tokens_per_minute: int | None) -> str:
    """Return the lines that let `key` in, for a keys file; raises `KeysFileError` for a name that is none."""
    lines = ["[[keys]]", f'name = "{name}"', f'sha256 = "{key_digest(key.encode()).hex()}"']
    if requests_per_minute is not None:
        lines.append(f"requests_per_minute = {requests_per_minute}")
    if tokens_per_minute is not None:
        lines.append(f"tokens_per_minute = {tokens_per_minute}")
    text = "\n".join(lines) + "\n"
    parse_keys(text)
    return text


def _fault(error: ValidationError) -> str:
    """Say what is wrong without showing it: somebody may have written the key itself into the file."""
    fault = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in fault["loc"]).lstrip(".")
    hint = "; 64 hexadecimal digits, as `mell key NAME` prints them" if place.endswith("sha256") else ""
    return f"{place}: {fault['msg']}{hint}"


def _check_unique(what: str, values: Sequence[str]) -> None:
    doubled = [value for value, count in Counter(values).items() if count > 1]
    if doubled:
        raise KeysFileError(f"the {what} {doubled[0]!r} stands there twice")
