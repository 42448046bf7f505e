import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from mell_gpu_worker.model_store import ModelStoreError, pull, verify
from mell_gpu_worker.model_store.checksums import CHECKSUMS_FILE

REVISION = "0123456789abcdef0123456789abcdef01234567"
WHOLE = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": b"weights",
    "tokenizer.json": b"{}",
    "modeling_own.py": b"raise SystemExit",
    "pytorch_model.bin": b"pickle",
    "onnx/model.onnx": b"other",
    "onnx/config.json": b"{}",
}
MODELS = {
    "some/whole": WHOLE,
    "some/pickled": {"config.json": b"{}", "pytorch_model.bin": b"pickle"},
    "some/sharded": {
        "config.json": b"{}",
        "model.safetensors.index.json": b'{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}',
        "model-1.safetensors": b"1",
    },
    "some/empty": {"README.md": b"nothing"},
}


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's HTTP interface as a download needs; `some/private` needs a token."""

    def do_HEAD(self) -> None:
        """Answer about a file."""
        self._answer(with_body=False)

    def do_GET(self) -> None:
        """Answer with a file or a model's description."""
        self._answer(with_body=True)

    def log_message(self, *_: object) -> None:
        """Stay quiet."""

    def _answer(self, *, with_body: bool) -> None:
        path = self.path.split("?")[0].strip("/")
        name = "/".join(path.removeprefix("api/models/").split("/")[:2])
        if name == "some/private" and self.headers.get("Authorization") == "Bearer secret":
            name = "some/whole"
        files = MODELS.get(name)
        if files is None:
            self._send(401, b"{}", {"X-Error-Code": "RepoNotFound"}, with_body=with_body)
        elif path.startswith("api/"):
            self._send(200, _description(name, files, path), {"Content-Type": "application/json"}, with_body=with_body)
        else:
            body = files[path.split("/", 4)[4]]
            headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": REVISION}
            self._send(200, body, headers, with_body=with_body)

    def _send(self, status: int, body: bytes, headers: dict[str, str], *, with_body: bool) -> None:
        self.send_response(status)
        for header, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(header, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)


def _description(name: str, files: dict[str, bytes], path: str) -> bytes:
    if "/tree/" in path:
        entries = [
            {"type": "file", "path": f, "size": len(b), "oid": hashlib.sha1(b).hexdigest()} for f, b in files.items()
        ]
        return json.dumps(entries).encode()
    siblings = [{"rfilename": file} for file in files]
    return json.dumps({"id": name, "sha": REVISION, "siblings": siblings}).encode()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Serve a hub on a free loopback port."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.fixture
def hub(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Point the hub client at our server, with a cache and settings of its own; return the store's folder."""
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return tmp_path / "models"


def quiet(_stage: str, _fraction: float | None) -> None:
    """Take progress and drop it."""


def test_a_hub_model_is_pulled_without_code_and_pickles(hub: Path) -> None:
    """Configuration, tokenizer and safetensors come, checksummed, under org--name; code and other formats do not."""
    folder = pull("some/whole", hub, quiet)
    assert folder == hub / "some--whole"
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        CHECKSUMS_FILE,
    }
    assert REVISION in (folder / CHECKSUMS_FILE).read_text()
    verify(folder)


def test_the_token_of_the_environment_is_used(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that needs a token is refused without one and pulled with it."""
    with pytest.raises(ModelStoreError, match=r"the hub refused 'some/private': .*check the name and HF_TOKEN"):
        pull("some/private", hub, quiet)
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert (pull("some/private", hub, quiet) / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("some/pickled", "has no model.safetensors: only safetensors weights are loaded"),
        ("some/sharded", "has no model-2.safetensors"),
        ("some/empty", "has no config.json"),
    ],
)
def test_models_without_all_their_safetensors_are_refused(name: str, message: str, hub: Path) -> None:
    """A model that could not be loaded afterwards is refused, and not shown as pulled."""
    with pytest.raises(ModelStoreError, match=message):
        pull(name, hub, quiet)
    assert not (hub / name.replace("/", "--")).exists()


def test_an_unreachable_hub_is_told_in_one_line(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network the error says so."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelStoreError, match="could not reach the hub for some/whole") as caught:
        pull("some/whole", hub, quiet)
    assert "\n" not in str(caught.value)


def test_offline_takes_what_the_hub_client_has(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With HF_HUB_OFFLINE a model in the client's cache is used, any other is told."""
    from huggingface_hub import snapshot_download

    snapshot_download("some/whole", cache_dir=constants.HF_HUB_CACHE)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert (pull("some/whole", hub, quiet) / "model.safetensors").read_bytes() == b"weights"
    with pytest.raises(ModelStoreError, match="HF_HUB_OFFLINE is set"):
        pull("some/sharded", hub, quiet)
