"""A real vLLM server on the CPU, in a process of its own and an environment of its own (`make vllm-test`)."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import httpx

from mell_shared.models import DEFAULT_MODEL, default_model_dir, locate_model
from mell_shared.process import death_with_parent
from tests.ports import free_port

_ROOT = Path(__file__).parent.parent
PYTHON = _ROOT / ".venv-vllm" / "bin" / "python"
_PATIENCE_S = 600.0
"""Weights are small, but a busy machine takes minutes to import and to warm up."""
_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


_CONNECTOR = {
    "kv_connector": "MellConnector",
    "kv_connector_module_path": "mell_vllm_connector.connector",
    "kv_role": "kv_both",
    "kv_load_failure_policy": "recompute",
}


class VllmProcess:
    """The server of the default model, while the context lasts; its words are in `log`.

    With a `connector` others can fetch its KV, at `kv_address`. `blocks`: of KV, if not as many as there is room for.
    """

    def __init__(self, folder: Path, *, connector: bool = False, blocks: int = 0) -> None:
        self.kv_address = f"tcp://127.0.0.1:{free_port()}" if connector else ""
        self.blocks = blocks
        self.log = folder / "vllm.log"
        self.folder = locate_model(DEFAULT_MODEL, default_model_dir())
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "VllmProcess":
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start it, and wait until it serves."""
        assert PYTHON.is_file(), f"no vLLM at {PYTHON}: run `make vllm-test`"
        command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.folder)]
        command += ["--served-model-name", DEFAULT_MODEL, "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--dtype", "float32", "--max-model-len", "2048", "--enforce-eager"]
        if self.kv_address:
            transfer = {**_CONNECTOR, "kv_connector_extra_config": {"address": self.kv_address}}
            command += ["--kv-transfer-config", json.dumps(transfer)]
        if self.blocks:
            command += ["--num-gpu-blocks-override", str(self.blocks)]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                # The connector as it is here, instead of what may have been installed there.
                env=os.environ
                | _ENVIRONMENT
                | {"PYTHONPATH": str(_ROOT / "services" / "gpu_worker"), "VLLM_SERVER_DEV_MODE": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=death_with_parent(signal.SIGTERM),  # noqa: PLW1509 - one system call, allocates nothing
            )
        deadline_s = time.monotonic() + _PATIENCE_S
        while not self._answers():
            assert self._process.poll() is None, f"vLLM ended: {self.log.read_text()[-3000:]}"
            assert time.monotonic() < deadline_s, f"vLLM does not answer: {self.log.read_text()[-3000:]}"
            time.sleep(0.5)

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    def kill(self) -> None:
        """End it and its engine process at once, as a crash of the machine does."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
