"""Command lines of the services of one stack: pure. Flags where they may be seen, variables for secrets."""

from collections.abc import Mapping
from dataclasses import dataclass

from mell_console.up.child import ChildSpec
from mell_console.up.plan import WorkerPlan
from mell_console.up.settings import UpSettings

_STREAMS_SHARE = 0.6
"""Of the time a service has to stop, for streams that still run; the rest is for ending them and itself."""

_SCALED_QUEUE_WAIT_S = "0"
"""No bound where workers are started on demand: the pace of a line says nothing of those that are on their way."""

_OF_ONE_PROCESS = {"MELL_METRICS_PORT", "MELL_DATA_PORT", "MELL_LOG_FORMAT"}
"""Variables that must not reach every child alike."""


@dataclass(frozen=True, slots=True)
class Launch:
    """What all services of a stack share; `python` is the interpreter's path, `environment` this process's own."""

    settings: UpSettings
    python: str
    environment: Mapping[str, str]
    nats_url: str
    port: int

    def scheduler(self) -> ChildSpec:
        """Return the scheduler's command line."""
        own = {"MELL_QUEUE_WAIT_S": _SCALED_QUEUE_WAIT_S} if self.settings.scales else {}
        return self._spec("scheduler", "mell_scheduler", self._metrics(0), {**own, **self._given("MELL_QUEUE_WAIT_S")})

    def frontend(self, workers: tuple[WorkerPlan, ...]) -> ChildSpec:
        """Return the frontend's command line; it serves every model that a worker has."""
        models = dict.fromkeys(f"{worker.served_name}={worker.model}" for worker in workers)
        flags = [part for model in models for part in ("--models", model)]
        flags += ["--host", self.settings.host, "--port", str(self.port), "--model-dir", str(self.settings.model_dir)]
        if self.settings.max_model_len:
            flags += ["--max-model-len", str(self.settings.max_model_len)]
        return self._spec("frontend", "mell_frontend", flags, {})

    def worker(self, plan: WorkerPlan, number: int) -> ChildSpec:
        """Return the command line of worker `number` (from 1)."""
        settings = self.settings
        flags = ["--worker-name", plan.name, "--engine", settings.engine, "--model", plan.model]
        flags += ["--served-model-name", plan.served_name, "--model-dir", str(settings.model_dir)]
        flags += ["--device", "cuda" if plan.gpu else "cpu", "--dtype", settings.dtype, "--threads", str(plan.threads)]
        flags += ["--kv-blocks", str(settings.kv_blocks), "--memory-share", f"{plan.memory_share:.4f}"]
        flags += ["--max-model-len", str(settings.max_model_len), *self._metrics(number)]
        flags += ["--vllm-url", plan.vllm_url] if plan.vllm_url else []
        devices = plan.gpu.uuid if plan.gpu else ""
        threads = {name: str(plan.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        return self._spec(plan.name, "mell_gpu_worker", flags, {"CUDA_VISIBLE_DEVICES": devices, **threads})

    def pull(self, model: str) -> ChildSpec:
        """Return the command line that fetches `model`."""
        arguments = (self.python, "-m", "mell_console", "model", "pull", model, "--log-format", "json")
        own = {"MELL_MODEL_DIR": str(self.settings.model_dir)}
        return ChildSpec(f"model {model}", arguments, self._environment(own))

    def _spec(self, name: str, module: str, flags: list[str], own: Mapping[str, str]) -> ChildSpec:
        common = ["--log-format", "json", "--log-level", self.settings.log_level]
        environment = self._environment({"MELL_NATS_URL": self.nats_url, **own})
        return ChildSpec(name, (self.python, "-m", module, *flags, *common), environment)

    def _environment(self, own: Mapping[str, str]) -> Mapping[str, str]:
        kept = {name: value for name, value in self.environment.items() if name not in _OF_ONE_PROCESS}
        patience_s = f"{self.settings.stop_s * _STREAMS_SHARE:g}"
        return {"MELL_STOP_DEADLINE_S": patience_s, **kept, "PYTHONUNBUFFERED": "1", **own}

    def _given(self, variable: str) -> Mapping[str, str]:
        return {variable: self.environment[variable]} if variable in self.environment else {}

    def _metrics(self, number: int) -> list[str]:
        return ["--metrics-port", str(self.settings.metrics_port + number)] if self.settings.metrics_port else []
