import socket
from dataclasses import replace
from typing import Any

import pytest

from mell_gpu_worker.core.capabilities import Capabilities
from mell_gpu_worker.data_port import open_data_port, try_data_port
from mell_gpu_worker.engine.fake import FakeEngine
from mell_gpu_worker.metrics import DataCounts
from mell_gpu_worker.settings import WorkerSettings
from mell_gpu_worker.transport import factory
from mell_gpu_worker.worker_config import modes_of, needs_data_port
from mell_shared.process import StartError
from tests.ports import free_port

from .streaming import worker_settings


def engine(settings: WorkerSettings, **spec: Any) -> FakeEngine:
    """A fake engine that claims to be another."""
    made = FakeEngine(settings.engine_options)
    made._spec = replace(made.spec, **spec)
    return made


@pytest.mark.parametrize("kind", ["tcp", "ucx"])
async def test_by_default_the_port_is_where_the_broker_is_reached_from(kind: str) -> None:
    """A broker on loopback: a data port on loopback, tried and measured before anything is served."""
    settings = worker_settings(transport=kind)
    transport = await open_data_port(settings, engine(settings), DataCounts())
    assert transport.address.startswith(f"{kind}://127.0.0.1:")
    lane = await try_data_port(transport, engine(settings), 0.0)
    assert lane.bytes_per_s > 0
    await transport.close()


async def test_host_and_port_are_settings() -> None:
    """What others are told is what was asked for."""
    port = free_port()
    settings = worker_settings(transport="tcp", data_host="localhost", data_port=port)
    transport = await open_data_port(settings, engine(settings), DataCounts())
    assert transport.address == f"tcp://localhost:{port}"
    await transport.close()


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"data_host": "192.0.2.1"}, "--data-host"),
        ({"nats_url": "nats://:1:2"}, "--data-host"),
    ],
)
async def test_a_port_that_cannot_be_had_is_said_in_one_line(changes: dict[str, str], hint: str) -> None:
    """With what to do about it."""
    settings = worker_settings(transport="tcp", **changes)
    with pytest.raises(StartError) as caught:
        await open_data_port(settings, engine(settings), DataCounts())
    assert hint in str(caught.value)
    assert "\n" not in str(caught.value)


async def test_a_taken_port_is_said_in_one_line() -> None:
    """With the settings that choose another."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = worker_settings(transport="tcp", data_port=taken.getsockname()[1])
        with pytest.raises(StartError, match="--data-port"):
            await open_data_port(settings, engine(settings), DataCounts())


def test_auto_takes_ucx_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else TCP."""
    monkeypatch.setattr(factory, "ucx_installed", lambda: True)
    assert factory.transport_kind("auto") == "ucx"
    monkeypatch.setattr(factory, "ucx_installed", lambda: False)
    assert factory.transport_kind("auto") == "tcp"
    assert factory.transport_kind("ucx") == "ucx"


def test_modes_are_those_asked_for_that_the_engine_has() -> None:
    """An engine that shows no memory is moved by tokens only; an empty setting moves nothing."""
    settings = worker_settings(migration_modes="tokens,hybrid")
    assert modes_of(settings, engine(settings).spec) == ("tokens", "hybrid")
    assert modes_of(settings, engine(settings, migration_modes=("tokens",)).spec) == ("tokens",)
    assert modes_of(worker_settings(migration_modes=""), engine(settings).spec) == ()


@pytest.mark.parametrize(("kind", "modes"), [("tcp", ("tokens",)), ("ucx", ("kv", "tokens", "hybrid"))])
def test_kv_of_a_gpu_moves_over_ucx_only(kind: str, modes: tuple[str, ...]) -> None:
    """Over TCP, which takes host memory, its sequences move by their tokens."""
    settings = worker_settings(transport=kind)
    assert modes_of(settings, engine(settings, device="cuda:0").spec) == modes


def test_engines_that_fetch_kv_need_no_port() -> None:
    """Whatever their servers' machines are called, and whatever carries the blocks of others."""
    settings = worker_settings(transport="tcp")
    spec = engine(settings, device="cuda-1:8000", migration_modes=("kv", "tokens"), can=Capabilities(kv="fetched")).spec
    assert modes_of(settings, spec) == ("kv", "tokens")
    assert not needs_data_port(spec, ("kv", "tokens"))


def test_an_unknown_mode_is_said_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """It names the modes that there are."""
    with pytest.raises(SystemExit):
        WorkerSettings.from_command_line(["--migration-modes", "kv,teleport"])
    told = capsys.readouterr().err
    assert "'teleport' is no migration mode: kv, tokens and hybrid are" in told
