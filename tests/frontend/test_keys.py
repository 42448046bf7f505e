"""Who may ask: digests, the keys file, and that it is read again when it changes."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from mell_frontend.key_store import KeyStore
from mell_frontend.keys import (
    ApiKey,
    KeyRing,
    KeysFileError,
    key_digest,
    keys_from_values,
    new_key,
    parse_keys,
    presented_key,
    show_entry,
)


def bearer(key: str) -> bytes:
    """Return the header's value that presents `key`."""
    return f"Bearer {key}".encode()


def entry(name: str, key: str, more: str = "") -> str:
    """Return one table of a keys file."""
    return f'[[keys]]\nname = "{name}"\nsha256 = "{key_digest(key.encode()).hex()}"\n{more}\n'


def test_a_ring_knows_its_keys_and_no_others() -> None:
    """A key is found by what it is, whatever the scheme's case; nothing else is, the digest itself neither."""
    keys = [ApiKey(name, key_digest(name.encode())) for name in ("one", "two")]
    ring = KeyRing(keys)
    assert [ring.find(bearer("one")), ring.find(b"bearer  two ")] == keys
    for wrong in (None, b"", b"Bearer", b"Bearer ", b"Basic one", b"one", bearer("three"), bearer("One")):
        assert ring.find(wrong) is None
    assert ring.find(bearer(keys[0].digest.hex())) is None
    assert KeyRing([]).find(b"Bearer ") is None


@given(st.binary(max_size=40))
def test_any_header_is_a_key_or_none(header: bytes) -> None:
    """Whatever the header holds, looking at it raises nothing, and only a right key is right."""
    ring = KeyRing([ApiKey("one", key_digest(b"one"))])
    assert (ring.find(header) is not None) == (presented_key(header) == b"one")


def test_keys_are_made_at_random() -> None:
    """A new key is long, printable and never the same."""
    made = {new_key() for _ in range(100)}
    assert len(made) == 100
    assert all(len(key) > 40 and key.isascii() and key.startswith("sk-") for key in made)


def test_a_setting_takes_keys_or_their_digests() -> None:
    """A key given as `sha256:HEX` opens the same door without standing in the environment."""
    plain, hashed = keys_from_values(["one", f"sha256:{key_digest(b'two').hex()}"])
    assert (plain.name, plain.digest, hashed.name, hashed.digest) == (
        "key-1",
        key_digest(b"one"),
        "key-2",
        key_digest(b"two"),
    )
    with pytest.raises(KeysFileError, match="64 hexadecimal"):
        keys_from_values(["sha256:12"])


def test_a_keys_file_names_keys_and_their_limits() -> None:
    """What `mell key` prints is what the file takes."""
    text = show_entry("team-a", "one", 60, None) + show_entry("b", "two", None, 10_000)
    assert parse_keys(text) == [
        ApiKey("team-a", key_digest(b"one"), requests_per_minute=60),
        ApiKey("b", key_digest(b"two"), tokens_per_minute=10_000),
    ]
    assert parse_keys("") == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[[keys", "no TOML"),
        ('[[keys]]\nname = "a"\n', "keys[0].sha256: Field required"),
        ('[[keys]]\nname = "a"\nsha256 = "my-secret-key"\n', "keys[0].sha256"),
        (entry("a b", "one"), "keys[0].name"),
        (entry("a", "one", "requests_per_minute = 0"), "keys[0].requests_per_minute"),
        (entry("a", "one", 'tokens_per_minute = "9"'), "keys[0].tokens_per_minute"),
        (entry("a", "one", "limit = 9"), "keys[0].limit: Extra"),
        (entry("a", "one") + entry("a", "two"), "'a' stands there twice"),
        (entry("a", "one") + entry("b", "one"), "stands there twice"),
        ("key = 1", "key: Extra"),
        (f"key = {'9' * 5_000}", "no TOML"),
        (f"key = {'[' * 5_000}", "no TOML"),
    ],
)
def test_what_is_wrong_with_a_keys_file_is_told(text: str, told: str) -> None:
    """A fault is named by its place in one line that never shows what may be a key."""
    with pytest.raises(KeysFileError) as caught:
        parse_keys(text)
    assert told in str(caught.value)
    assert "my-secret-key" not in str(caught.value)
    assert caught.value.__cause__ is None or "no TOML" in told


@given(st.text(max_size=300) | st.text(st.sampled_from('[]keysnamsha256= "\n0af'), max_size=120))
def test_any_text_is_a_keys_file_or_a_fault(text: str) -> None:
    """Reading raises nothing but `KeysFileError`."""
    with suppress(KeysFileError):
        assert isinstance(parse_keys(text), list)


def replace(path: Path, text: str) -> None:
    """Put a new file in the old one's place, as editors and Kubernetes do."""
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    fresh.replace(path)


def test_the_file_is_read_again_when_it_changes(tmp_path: Path) -> None:
    """Keys come and go without a restart; a file with a fault, or none, leaves those that were there, and says so."""
    path = tmp_path / "keys.toml"
    path.write_text(entry("a", "one"))
    store = KeyStore(["fixed"], path)
    seen: list[list[str]] = []
    store.on_change(lambda keys: seen.append([key.name for key in keys]))
    store.look()
    replace(path, entry("b", "two"))
    store.look()
    assert seen == [["key-1", "a"], ["key-1", "b"]]
    assert store.ring is not None
    for broken in (lambda: replace(path, "[[keys"), path.unlink):
        broken()
        with structlog.testing.capture_logs() as lines:
            store.look()
            store.look()
        assert [line["event"] for line in lines] == ["keys_not_read"]
        assert store.ring.find(bearer("two")) is not None
    path.write_text("")
    store.look()
    assert store.ring.find(bearer("two")) is None
    assert store.ring.find(bearer("fixed")) is not None


def test_a_name_is_one_key_s_in_file_and_settings_together(tmp_path: Path) -> None:
    """Keys of the settings are called key-1 and so on; one of the file with such a name would share its limits."""
    path = tmp_path / "keys.toml"
    path.write_text(entry("key-2", "two"))
    store = KeyStore(["fixed"], path)
    replace(path, entry("key-1", "one"))
    with structlog.testing.capture_logs() as lines:
        store.look()
    assert "'key-1' belongs to a key of the settings" in lines[0]["why"]
    assert store.ring is not None
    assert store.ring.find(bearer("two")) is not None
    with pytest.raises(KeysFileError, match="key-1"):
        KeyStore(["fixed"], path)


def test_without_any_key_left_nobody_may_ask(tmp_path: Path) -> None:
    """An empty file is not the same as none: it lets nobody in."""
    path = tmp_path / "keys.toml"
    path.write_text("")
    store = KeyStore([], path)
    assert store.ring is not None
    assert store.ring.find(bearer("one")) is None
    assert KeyStore([]).ring is None


@pytest.mark.parametrize("content", [None, b"[[keys", b"\xff"])
def test_a_file_that_cannot_be_read_ends_the_start(tmp_path: Path, content: bytes | None) -> None:
    """At start a fault is an error that names the file."""
    path = tmp_path / "keys.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(KeysFileError, match=r"keys\.toml"):
        KeyStore([], path)


async def test_keys_from_a_file_open_the_door(connect: Callable[..., httpx.AsyncClient], tmp_path: Path) -> None:
    """A key of the file may ask, its name stands in the log line, the key itself does not."""
    path = tmp_path / "keys.toml"
    path.write_text(entry("team-a", "sk-one"))
    client = connect(api_keys_file=path)
    assert (await client.get("/v1/models")).status_code == 401
    with structlog.testing.capture_logs() as lines:
        assert (await client.get("/v1/models", headers={"authorization": "Bearer sk-one"})).status_code == 200
    assert lines[0]["key"] == "team-a"
    assert "sk-one" not in str(lines)


def test_the_stamp_sees_a_file_of_the_same_size(tmp_path: Path) -> None:
    """A file replaced by one as long and as old is still seen to be another."""
    path = tmp_path / "keys.toml"
    path.write_text(entry("a", "one"))
    os.utime(path, ns=(1, 1))
    store = KeyStore([], path)
    replace(path, entry("a", "two"))
    os.utime(path, ns=(1, 1))
    store.look()
    assert store.ring is not None
    assert store.ring.find(bearer("two")) is not None
