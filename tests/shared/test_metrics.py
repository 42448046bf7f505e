import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from prometheus_client import Counter
from prometheus_client.parser import text_string_to_metric_families

from mell_shared import health, metrics
from mell_shared.memory_bus import MemoryBroker
from mell_shared.metrics import BusCollector, new_registry, open_endpoint, serve_metrics
from mell_shared.process import StartError
from tests.ports import free_port


class Service:
    """What answers, and how well it is."""

    def __init__(self) -> None:
        self.registry = new_registry()
        self.well = True
        self.port = 0

    @property
    def url(self) -> str:
        """Where its health is."""
        return f"http://127.0.0.1:{self.port}/health"


@pytest_asyncio.fixture
async def service() -> AsyncIterator[Service]:
    """A service with its endpoint on a free port."""
    made = Service()
    async with open_endpoint(made.registry, lambda: made.well, host="127.0.0.1", port=0) as made.port:
        yield made


async def ask(port: int, request: bytes) -> tuple[int, bytes, bytes]:
    """Send raw bytes; return the status, the head and the body of the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    async with asyncio.timeout(60):
        answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split(b" ")[1]) if head else 0, head, body


async def test_metrics_are_prometheus_text(service: Service) -> None:
    """`/metrics` holds the process's own and the service's metrics, in a form that Prometheus reads."""
    Counter("mell_dishes", "Dishes.", registry=service.registry).inc(3)
    status, head, body = await ask(service.port, b"GET /metrics?x=1 HTTP/1.1\r\nHost: x\r\n\r\n")
    families = {family.name: family for family in text_string_to_metric_families(body.decode())}
    assert status == 200
    assert b"text/plain" in head
    assert families["mell_dishes"].samples[0].value == 3
    assert "process_resident_memory_bytes" in families


async def test_registries_are_the_process_s_own() -> None:
    """Two registries know nothing of each other, so that tests and services in one process do not collide."""
    for _ in range(2):
        Counter("mell_dishes", "Dishes.", registry=new_registry())


async def test_health_follows_the_callable(service: Service) -> None:
    """200 while well, 503 while not, and the check for containers agrees."""
    assert await asyncio.to_thread(health.check, service.url) == ""
    service.well = False
    status, _, body = await ask(service.port, b"GET /health HTTP/1.0\r\n\r\n")
    assert (status, body) == (503, b'{"status": "unavailable"}')
    assert await asyncio.to_thread(health.check, service.url) == f"{service.url} answers 503"


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 404),
        (b"POST /metrics HTTP/1.1\r\n\r\n", 405),
        (b"\r\n\r\n", 405),
        (b"\xff\xfe \x00\r\n\r\n", 405),
        (b"GET\r\n\r\n", 404),
        (b"GET " + b"x" * 100_000 + b"\r\n\r\n", 0),
    ],
)
async def test_other_requests_are_refused(service: Service, request_: bytes, status: int) -> None:
    """Unknown paths, other methods and what is not HTTP get an answer or a closed connection, and harm nothing."""
    assert (await ask(service.port, request_))[0] == status
    assert (await ask(service.port, b"GET /health HTTP/1.1\r\n\r\n"))[0] == 200


async def test_head_has_no_body(service: Service) -> None:
    """A HEAD request gets the head of the GET alone."""
    status, head, body = await ask(service.port, b"HEAD /health HTTP/1.1\r\n\r\n")
    assert (status, body) == (200, b"")
    assert b"content-length: 16" in head


async def test_a_silent_client_is_dropped(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that asks nothing is closed after a while."""
    monkeypatch.setattr(metrics, "_REQUEST_TIMEOUT_S", 0.05)
    assert (await ask(service.port, b"GET /health"))[0] == 0


async def test_closing_does_not_wait_for_clients() -> None:
    """A client that holds its connection open does not hold up the service's stop, and the port is free after."""
    async with open_endpoint(new_registry(), lambda: True, host="127.0.0.1", port=free_port()) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.sleep(0.01)
    async with asyncio.timeout(60):
        assert await reader.read() == b""
    writer.close()
    async with open_endpoint(new_registry(), lambda: True, host="127.0.0.1", port=port) as again:
        assert again == port


async def test_port_zero_serves_nothing() -> None:
    """The setting's 0 means no endpoint; any other port serves."""
    async with serve_metrics(new_registry(), lambda: True, host="127.0.0.1", port=0):
        pass
    port = free_port()
    async with serve_metrics(new_registry(), lambda: True, host="127.0.0.1", port=port):
        assert (await ask(port, b"GET /health HTTP/1.1\r\n\r\n"))[0] == 200


async def test_a_taken_port_says_so(service: Service) -> None:
    """The error names the port and the setting, in one line."""
    with pytest.raises(StartError, match=rf"{service.port} \(.*in use\); set MELL_METRICS_PORT"):
        async with serve_metrics(new_registry(), lambda: True, host="127.0.0.1", port=service.port):
            pass


async def test_a_bus_s_counts_are_metrics() -> None:
    """Connection, drops, reconnections and errors can be watched."""
    registry, bus = new_registry(), MemoryBroker().connect()
    registry.register(BusCollector(bus))
    bus.stats.dropped, bus.stats.errors["TimeoutError"] = 2, 1
    bus.disconnect()
    bus.reconnect()
    assert registry.get_sample_value("mell_bus_connected") == 1
    assert registry.get_sample_value("mell_bus_dropped_total") == 2
    assert registry.get_sample_value("mell_bus_reconnections_total") == 1
    assert registry.get_sample_value("mell_bus_errors_total", {"error": "TimeoutError"}) == 1
    bus.disconnect()
    assert registry.get_sample_value("mell_bus_connected") == 0
    await bus.close()


async def test_the_health_command_s_exit_code(service: Service) -> None:
    """`python -m mell_shared.health URL` is 0 for a service that is well, whatever proxy the environment names."""
    command = [sys.executable, "-m", "mell_shared.health", service.url]
    ran = await asyncio.to_thread(
        subprocess.run, command, capture_output=True, env={"http_proxy": "http://127.0.0.1:1"}, timeout=60
    )
    assert (ran.returncode, ran.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "usage"),
        (["a", "b"], "usage"),
        (["file:///etc/passwd"], "no http address"),
        (["http://127.0.0.1:1/health"], "does not answer"),
        (["http://127.0.0.1:port/"], "does not answer"),
    ],
)
def test_the_health_command_says_what_is_wrong(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everything but a 200 is exit code 1 and one line."""
    assert health.main(arguments) == 1
    err = capsys.readouterr().err
    assert told in err
    assert err.count("\n") == 1
