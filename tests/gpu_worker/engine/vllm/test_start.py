"""A server that cannot stand for an engine is told from one that can, in one line that says what to do."""

import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mell_gpu_worker.engine.base import EngineError
from mell_gpu_worker.engine.vllm.process import ServerProcess
from mell_gpu_worker.settings import WorkerSettings
from mell_shared.models import FAKE_MODEL
from tests.console.up_process import alive
from tests.ports import free_port
from tests.vllm_server import FakeVllm

from .conftest import StartEngine


@pytest.mark.parametrize(
    ("knobs", "options", "words"),
    [
        ({}, {"vllm_model": "other"}, "has no model 'other', it has: fake; set --vllm-model"),
        ({"model": "one,two"}, {}, "serves several models: one, two; set --vllm-model"),
        ({"gives_ids": False, "version": "0.9.1"}, {}, "(0.9.1) gives no token ids: it must be version 0.10.2"),
        ({"key": "secret"}, {"vllm_api_key": "wrong"}, "set MELL_VLLM_API_KEY"),
        ({"max_model_len": 100}, {"max_model_len": 101}, "--max-model-len 101 is over the 100"),
        ({"block_tokens": 32}, {"block_tokens": 16}, "leave it out, or set it to 32"),
        ({"blocks": 11}, {"kv_blocks": 11}, "--kv-blocks 11 is over the 10"),
        ({"tells_metrics": False}, {}, "start it without --disable-log-stats"),
        ({"max_model_len": None}, {}, "it is no vLLM server"),
        ({"health": 404}, {}, "there is no /health"),
        ({"health": 503}, {}, "no vLLM server answers"),
        ({"status": 400}, {}, "refuses a completion: it is not well"),
        ({}, {"vllm_url": "nonsense"}, "no vLLM server answers at nonsense"),
        ({}, {"vllm_url": "http://127.0.0.1:1"}, "start one, or set --vllm-url"),
        ({}, {"vllm_command": "/no/such/program --port 1"}, "cannot be started"),
        ({}, {"vllm_command": f"{sys.executable} -c 'raise SystemExit(3)'", "vllm_url": ""}, "exit code 3"),
    ],
)
def test_a_start_that_cannot_succeed_says_why(
    server: FakeVllm, start_engine: StartEngine, knobs: dict[str, Any], options: dict[str, Any], words: str
) -> None:
    """One line, and nothing is left running."""
    for name, value in knobs.items():
        setattr(server.knobs, name, value)
    with pytest.raises(EngineError) as error:
        start_engine(**options)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_what_the_server_says_is_what_the_worker_is(server: FakeVllm, start_engine: StartEngine) -> None:
    """Length, blocks and their size come from it; less may be asked for, and the model may have another name there."""
    server.knobs.model, server.knobs.block_tokens, server.knobs.max_model_len = "theirs", 32, 1000
    spec = start_engine().spec
    assert (spec.max_model_len, spec.kv_blocks, spec.block_tokens) == (1000, server.knobs.blocks - 1, 32)
    spec = start_engine(vllm_model="theirs", max_model_len=500, kv_blocks=9, block_tokens=32).spec
    assert (spec.max_model_len, spec.kv_blocks) == (500, 9)
    assert (spec.migration_modes, spec.kv_layout, spec.kv_source) == (("tokens",), "vllm", "")


def test_a_server_with_a_connector_moves_by_kv(server: FakeVllm, start_engine: StartEngine) -> None:
    """Its layout is that of all, for by tokens they move to one another; without a cache it is of no use."""
    server.knobs.kv_address = "tcp://10.0.0.5:5601"
    spec = start_engine().spec
    assert spec.migration_modes == ("kv", "tokens")
    assert (spec.kv_layout, spec.kv_source) == ("vllm", "tcp://10.0.0.5:5601")
    assert spec.kv_bytes_per_token == 64
    assert (spec.can.kv, spec.can.blocks) == ("fetched", "estimated")
    server.knobs.prefix_cache = False
    assert start_engine().spec.migration_modes == ("tokens",)


def test_a_model_of_the_workers_own_name_is_preferred(server: FakeVllm, start_engine: StartEngine) -> None:
    """Adapters beside it need no flag."""
    server.knobs.model = f"adapter,{FAKE_MODEL}"
    start_engine()


def test_capabilities_are_the_servers(server: FakeVllm, start_engine: StartEngine) -> None:
    """A key opens it; without log-probabilities or a prefix cache there, the worker has none."""
    server.knobs.key, server.knobs.gives_logprobs, server.knobs.prefix_cache = "secret", False, False
    can = start_engine(vllm_api_key="secret").spec.can
    assert (can.logprobs, can.prefix_cache, can.seeded_sameness) == (False, False, False)


def test_a_server_of_its_own_is_started_and_ended() -> None:
    """With the command; the engine waits until it answers, and says so if it ends."""
    port = free_port()
    from mell_gpu_worker.engine.factory import make_engine

    command = f"{sys.executable} -m tests.vllm_server --port {port}"
    settings = WorkerSettings(
        engine="vllm", model=FAKE_MODEL, vllm_url=f"http://127.0.0.1:{port}", vllm_command=command, vllm_start_s=60
    )
    engine = make_engine(settings.engine_options)
    engine.close()
    with pytest.raises(EngineError, match="ended with exit code"):
        engine.execute(())


def test_block_size_zero_is_for_vllm_only() -> None:
    """It is its default; other engines need a number."""
    assert WorkerSettings(engine="vllm", model="m").block_tokens == 0
    assert WorkerSettings(engine="vllm", model="m", block_tokens=32).block_tokens == 32
    assert WorkerSettings(engine="fake").block_tokens == 16
    with pytest.raises(ValueError, match="block_tokens 0"):
        WorkerSettings(engine="fake", block_tokens=0)


def test_nothing_of_a_command_outlives_the_worker(tmp_path: Path) -> None:
    """A script's own program does not hear that the script was told to stop; it would keep the GPU."""
    inner = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    script = tmp_path / "serve.sh"
    script.write_text(f'{sys.executable} -c "{inner}" &\nwait\n')
    process = ServerProcess(f"sh {script}")
    deadline_s = time.monotonic() + 60
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()):
        process.check()
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    pid = int((tmp_path / "pid").read_text())
    assert alive(pid)
    process.stop()
    while alive(pid):
        assert time.monotonic() < deadline_s, "the script's program still runs"
        time.sleep(0.01)
    process.stop()
