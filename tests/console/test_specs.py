from dataclasses import replace
from pathlib import Path

import pytest

from mell_console.up.machine import Gpu
from mell_console.up.plan import WorkerPlan
from mell_console.up.settings import UpSettings
from mell_console.up.specs import Launch
from mell_frontend.settings import FrontendSettings
from mell_gpu_worker.settings import WorkerSettings

SECRET = "nats://mell:secret@127.0.0.1:1"


def launch(*flags: str, **environment: str) -> Launch:
    """Return a launch with settings from `flags`, in `environment`."""
    settings = UpSettings.from_command_line([*flags])
    return Launch(settings, "/bin/python", environment, SECRET, 8123)


def plan(gpu: Gpu | None = None) -> WorkerPlan:
    """Return one worker's part."""
    return WorkerPlan("worker-1", "org/model", "public", 3, 0.25, gpu)


def test_no_secret_stands_on_a_command_line() -> None:
    """The broker's password goes by a variable, since everybody can list command lines."""
    made = launch()
    for spec in (made.scheduler(), made.worker(plan(), 1), made.frontend((plan(),))):
        assert spec.environment["MELL_NATS_URL"] == SECRET
        assert not any("secret" in argument for argument in spec.arguments)


def test_a_worker_s_flags_are_settings_it_has() -> None:
    """The worker reads back exactly the part of the machine that it was given."""
    made = launch("--kv-blocks", "77", "--dtype", "float32", "--max-model-len", "512", "--metrics-port", "9000")
    spec = made.worker(plan(), 2)
    read = WorkerSettings.from_command_line(list(spec.arguments[3:]))
    assert (read.worker_name, read.model, read.public_model, read.threads) == ("worker-1", "org/model", "public", 3)
    assert (read.kv_blocks, read.memory_share, read.dtype, read.max_model_len) == (77, 0.25, "float32", 512)
    assert (read.device, read.metrics_port, read.log_format) == ("cpu", 9002, "json")
    assert spec.environment["OMP_NUM_THREADS"] == "3"
    assert spec.environment["CUDA_VISIBLE_DEVICES"] == ""


def test_a_worker_on_a_gpu_sees_that_gpu_only() -> None:
    """CUDA_VISIBLE_DEVICES names the worker's device by uuid, whatever the order of devices."""
    spec = launch().worker(plan(Gpu(3, "GPU-dddd", "card", 1, 1)), 1)
    assert spec.environment["CUDA_VISIBLE_DEVICES"] == "GPU-dddd"
    assert WorkerSettings.from_command_line(list(spec.arguments[3:])).device == "cuda"


def test_a_worker_before_a_vllm_server_is_told_where_it_is() -> None:
    """Its own, whatever a variable says; block size and length are then the server's."""
    made = launch("--engine", "vllm", "--vllm-url", "http://a", MELL_VLLM_API_KEY="key")
    spec = made.worker(replace(plan(), vllm_url="http://a"), 1)
    read = WorkerSettings.from_command_line(list(spec.arguments[3:]))
    assert (read.engine, read.vllm_url, read.block_tokens, read.max_model_len) == ("vllm", "http://a", 0, 0)
    assert spec.environment["MELL_VLLM_API_KEY"] == "key"


def test_the_frontend_serves_each_model_once_under_its_public_name() -> None:
    """Several workers of one model are one model to clients."""
    other = WorkerPlan("worker-2", "b", "b", 1, 0.1)
    spec = launch("--host", "127.0.0.2", "--max-model-len", "99").frontend((plan(), other, plan()))
    read = FrontendSettings.from_command_line(list(spec.arguments[3:]))
    assert read.models == ["public=org/model", "b=b"]
    assert (read.host, read.port, read.max_model_len) == ("127.0.0.2", 8123, 99)


def test_variables_of_single_services_are_passed_on() -> None:
    """Settings that `mell up` does not know still reach the services, but one metrics port never reaches all."""
    environment = launch(MELL_API_KEYS="k", MELL_METRICS_PORT="9", PATH="/bin").frontend((plan(),)).environment
    assert (environment["MELL_API_KEYS"], environment["PATH"]) == ("k", "/bin")
    assert "MELL_METRICS_PORT" not in environment


def test_services_give_their_streams_up_before_they_would_be_killed() -> None:
    """The frontend's patience with running streams is shorter than the stack's with it, unless it is set."""
    spec = launch("--stop-s", "10").frontend((plan(),))
    assert float(spec.environment["MELL_STOP_DEADLINE_S"]) == 6
    spec = launch("--stop-s", "10", MELL_STOP_DEADLINE_S="2").worker(plan(), 1)
    assert spec.environment["MELL_STOP_DEADLINE_S"] == "2"


def test_a_model_is_pulled_by_our_own_command_into_the_stack_s_folder() -> None:
    """The download runs as `mell model pull` in a process that can be ended, and tells its progress as JSON."""
    spec = launch("--model-dir", "/models").pull("org/model")
    assert spec.arguments[1:] == ("-m", "mell_console", "model", "pull", "org/model", "--log-format", "json")
    assert spec.environment["MELL_MODEL_DIR"] == "/models"


@pytest.mark.parametrize("flags", [["--model", "a", "--model", "b"], ["--model", "a,b"], ["--model=a, b"]])
def test_models_can_be_repeated_or_listed(flags: list[str]) -> None:
    """A flag given twice and one with commas mean the same."""
    assert UpSettings.from_command_line(flags).model == ["a", "b"]


def test_every_option_has_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """MELL_ variables are read, and flags win over them."""
    monkeypatch.setenv("MELL_MODEL", "a,b")
    monkeypatch.setenv("MELL_WORKERS", "5")
    monkeypatch.setenv("MELL_MODEL_DIR", "/models")
    settings = UpSettings.from_command_line(["--workers", "3"])
    assert (settings.model, settings.workers, settings.model_dir) == (["a", "b"], "3", Path("/models"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [(["--workers", "0"], "--workers"), (["--engine", "x"], "--engine"), (["--bogus", "1"], "--bogus")],
)
def test_a_wrong_option_is_told_and_ends_with_code_2(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A wrong flag is named on standard error and nothing is started."""
    with pytest.raises(SystemExit) as ended:
        UpSettings.from_command_line(flags)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
