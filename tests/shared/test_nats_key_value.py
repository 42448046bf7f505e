import os
import signal
from pathlib import Path

import pytest

from mell_shared.key_value import KeyValueError, KeyValueUnavailableError
from mell_shared.nats_bus import NatsBus
from mell_shared.nats_key_value import NatsKeyValue
from mell_shared.nats_server import NatsServer
from tests.conftest import BusFactory
from tests.shared.conftest import freeze

WAIT_S = 60.0


async def test_a_broker_that_stands_still_costs_the_time_out(tmp_path: Path) -> None:
    """No answer is an error after the time given, and the same store works again afterwards."""
    with NatsServer(tmp_path) as server:
        bus = await NatsBus.connect(server.url)
        store = NatsKeyValue(bus, "test", 60)
        await store.write("lease", b"1", 0, WAIT_S)
        await freeze(server)
        with pytest.raises(KeyValueError, match="in time"):
            await store.read("lease", 0.05)
        os.kill(server.pid, signal.SIGCONT)
        entry = await store.read("lease", WAIT_S)
        assert entry is not None
        assert entry.value == b"1"
        await bus.close()


async def test_a_broker_without_jetstream_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says how to start the broker, or how to do without."""
    write_config = NatsServer._write_config

    def without_jetstream(server: NatsServer) -> None:
        write_config(server)
        lines = server._config.read_text().splitlines(keepends=True)
        server._config.write_text("".join(line for line in lines if not line.startswith("jetstream")))

    monkeypatch.setattr(NatsServer, "_write_config", without_jetstream)
    with NatsServer(tmp_path) as server:
        bus = await NatsBus.connect(server.url)
        with pytest.raises(KeyValueUnavailableError, match="-js"):
            await NatsKeyValue(bus, "test", 60).read("lease", WAIT_S)
        await bus.close()


async def test_an_outcome_s_errors_are_the_store_s_own(connect_bus: BusFactory) -> None:
    """What the broker refuses for another reason (a bad key) is the store's error too."""
    store = NatsKeyValue(await connect_bus(), "test-keys", 60)
    with pytest.raises(KeyValueError):
        await store.read("a b", WAIT_S)
