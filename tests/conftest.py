"""Fixtures for every area: a real broker for the session, and buses that are closed when their test ends."""

import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, settings

from mell_gpu_worker.engine.openmp import wait_politely
from mell_shared.nats_bus import NatsBus
from mell_shared.nats_server import NatsServer
from tests.vllm_process import VllmProcess

# Started in the background, as by `make test &`, it would be ignored here and in every process that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Before any test imports torch, whose threads would keep the cores from the processes that tests start.
wait_politely()

# Wall-clock limits on examples fail on a busy machine and say nothing about the code. The same examples each time: a
# failure then comes of what was changed. New ones are drawn by `make soak` and `make fuzz`.
settings.register_profile("explore", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("same", settings.get_profile("explore"), derandomize=True, database=None)
settings.load_profile("same")

_MEASURED = (
    "frontend/stream/",
    "frontend/test_rate_limits",
    "gpu_worker/core/",
    "scheduler/policy/",
    "scheduler/test_core_",
    "scheduler/test_journal",
    "vllm_connector/test_content",
)
"""Whose tests are held to the coverage of the pure packages."""

BusFactory = Callable[[], Awaitable[NatsBus]]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Measure coverage by the pure packages' own tests that draw no examples: tracing makes a test twice as slow."""
    for item in items:
        path = item.path.relative_to(Path(__file__).parent).as_posix()
        if item.get_closest_marker("hypothesis") or not path.startswith(_MEASURED):
            item.add_marker(pytest.mark.no_cover)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show what tests have recorded to be told, as `told`; also where they ran in other processes."""
    for report in terminalreporter.stats.get("passed", []):
        for name, text in report.user_properties:
            if name == "told":
                terminalreporter.write_line(str(text))


@pytest.fixture(scope="session")
def nats_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """A real nats-server on a free loopback port, for the whole session; tests must not stop it."""
    with NatsServer(tmp_path_factory.mktemp("nats")) as server:
        yield server


@pytest_asyncio.fixture
async def connect_bus(nats_server: NatsServer) -> AsyncIterator[BusFactory]:
    """Make connections to the session's server; they are closed, and their handlers' failures raised, at the end."""
    async with AsyncExitStack() as stack:

        async def connect() -> NatsBus:
            bus = await NatsBus.connect(nats_server.url, name="test")
            stack.push_async_callback(bus.close)
            return bus

        yield connect


@pytest.fixture(scope="session")
def real_vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmProcess]:
    """A real vLLM server for the session; whoever ends it starts it again."""
    with VllmProcess(tmp_path_factory.mktemp("vllm")) as server:
        yield server
