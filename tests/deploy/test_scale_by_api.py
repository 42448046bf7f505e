import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.deploy.manifests import FOLDER

SCRIPT = FOLDER / "overlays" / "scaler" / "scale.py"
PATH = "/apis/apps/v1/namespaces/mell/statefulsets/gpu-worker/scale"


class Api(ThreadingHTTPServer):
    """A cluster's API that knows one number, and refuses who has read an older version of it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.replicas = 3
        self.version = 7
        self.raced = False
        self.tokens: set[str] = set()


class Handler(BaseHTTPRequestHandler):
    """Answers GET and PATCH of the scale."""

    server: Api

    def do_GET(self) -> None:
        """Say the number and its version."""
        version = self.server.version
        self.server.version += self.server.raced  # before the answer, on which the next request follows
        self._answer(200, {"metadata": {"resourceVersion": str(version)}, "spec": self._spec()})

    def do_PATCH(self) -> None:
        """Set it, if the version is the one that was read."""
        told = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if told["metadata"]["resourceVersion"] != str(self.server.version):
            self._answer(409, {"message": "the object has been modified"})
            return
        assert self.headers["content-type"] == "application/merge-patch+json"
        self.server.replicas = told["spec"]["replicas"]
        self._answer(200, {"spec": self._spec()})

    def _spec(self) -> dict[str, int]:
        return {"replicas": self.server.replicas}

    def _answer(self, status: int, body: object) -> None:
        self.server.tokens.add(self.headers["authorization"])
        data = json.dumps(body).encode()
        self.send_response(status if self.path == PATH else 404)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def api() -> Iterator[Api]:
    """A running API."""
    with Api() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def scale(api: Api, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the script as a pod with a service account would."""
    (folder / "namespace").write_text("mell")
    (folder / "token").write_text("secret\n")
    environment = os.environ | {
        "KUBE_API": f"http://127.0.0.1:{api.server_port}",
        "KUBE_ACCOUNT_DIR": str(folder),
        "no_proxy": "127.0.0.1",
    }
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("arguments", "code", "replicas"),
    [
        (("start", "5", "gpu-worker-3", "gpu-worker-4"), 0, 5),
        (("start", "3", "gpu-worker-2"), 0, 3),
        (("start", "2", "gpu-worker-1"), 0, 3),
        (("stop", "2", "gpu-worker-2"), 0, 2),
        (("stop", "2", "gpu-worker-1"), 1, 3),
        (("stop", "1", "gpu-worker-1"), 1, 3),
        (("restart", "1", "gpu-worker-1"), 1, 3),
        (("start", "many", "gpu-worker-1"), 1, 3),
        (("stop", "2"), 1, 3),
    ],
)
def test_the_number_is_set_as_ordered(
    api: Api, tmp_path: Path, arguments: tuple[str, ...], code: int, replicas: int
) -> None:
    """Raised by a start, never lowered by one; lowered by a stop of the last only."""
    done = scale(api, tmp_path, *arguments)
    assert (done.returncode, api.replicas) == (code, replicas), done.stderr
    assert done.stderr.count("\n") == code
    assert api.tokens <= {"Bearer secret"}


def test_a_change_by_somebody_else_wins(api: Api, tmp_path: Path) -> None:
    """What was read is not what is there any more: nothing is set, and it is told."""
    api.raced = True
    done = scale(api, tmp_path, "stop", "2", "gpu-worker-2")
    assert (done.returncode, api.replicas) == (1, 3)
    assert "409" in done.stderr
