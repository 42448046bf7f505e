"""Nkeys and TLS against a real nats-server: who is let in, and that nothing goes in clear where TLS is wanted."""

import asyncio
import json
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nkeys
import pytest
import trustme

from mell_shared.broker_access import BrokerAccess
from mell_shared.bus import BrokerUnreachableError, Bus, Delivery
from mell_shared.nats_bus import NatsBus
from mell_shared.nats_server import NatsServer


@dataclass(frozen=True, slots=True)
class Certificates:
    """Files of one authority, of the broker's certificate and of a client's."""

    ca: Path
    broker: Path
    client: Path


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Certificates of a fresh authority."""
    folder, authority = tmp_path_factory.mktemp("tls"), trustme.CA()
    files = Certificates(folder / "ca.pem", folder / "broker.pem", folder / "client.pem")
    authority.cert_pem.write_to_path(files.ca)
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(files.broker)
    authority.issue_cert("worker@mell").private_key_and_cert_chain_pem.write_to_path(files.client)
    return files


def tls_block(certificates: Certificates, *, verify: bool) -> str:
    """Return the lines that make a server ask for TLS."""
    files = {"cert_file": certificates.broker, "key_file": certificates.broker, "ca_file": certificates.ca}
    return f"tls: {json.dumps({**{name: str(path) for name, path in files.items()}, 'verify': verify})}\n"


@pytest.fixture(scope="module")
def tls_server(certificates: Certificates, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """A server that speaks TLS only."""
    with NatsServer(tmp_path_factory.mktemp("server"), access=tls_block(certificates, verify=False)) as server:
        yield server


async def check_works(bus: Bus) -> None:
    """Ask something over the bus and get an answer."""

    async def answer(delivery: Delivery) -> None:
        await bus.publish(delivery.reply_to, delivery.data * 2)

    await bus.subscribe("twice", answer)
    assert await bus.request("twice", b"ab", 60.0) == b"abab"


async def refusals(*attempts: tuple[str, BrokerAccess]) -> list[str]:
    """Try to connect, all at once, for long enough to hear why it is refused; return what each is told."""

    async def told(url: str, access: BrokerAccess) -> str:
        with pytest.raises(BrokerUnreachableError) as caught:
            await NatsBus.connect(url, access=access, timeout_s=5.0)
        return str(caught.value)

    return await asyncio.gather(*(told(*attempt) for attempt in attempts))


async def test_over_tls(tls_server: NatsServer, certificates: Certificates) -> None:
    """With the broker's authority a service works over TLS, and again after a reconnection."""
    bus = await NatsBus.connect(f"tls://{tls_server.address}", access=BrokerAccess(tls_ca=certificates.ca))
    await check_works(bus)
    assert bus.client._transport._io_writer.get_extra_info("cipher")
    again = asyncio.Event()
    bus.on_reconnect(again.set)
    tls_server.kill()
    tls_server.start()
    async with asyncio.timeout(60):
        await again.wait()
    assert await bus.request("twice", b"c", 60.0) == b"cc"
    await bus.close()


async def test_a_broker_of_another_authority_is_not_trusted(tls_server: NatsServer, tmp_path: Path) -> None:
    """A certificate that the given authority, or the system, did not sign ends the connection in one line."""
    other = tmp_path / "other.pem"
    trustme.CA().cert_pem.write_to_path(other)
    url = f"tls://{tls_server.address}"
    for told in await refusals((url, BrokerAccess(tls_ca=other)), (url, BrokerAccess())):
        assert "certificate verify failed" in told.lower()
        assert "\n" not in told


async def test_a_broker_without_tls_gets_no_password(nats_server: NatsServer, certificates: Certificates) -> None:
    """Where TLS is wanted, by the address or a file, a broker that offers none is refused before anything is sent."""
    heard: list[bytes] = []

    async def pretend(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"server_id":"X","max_payload":1048576,"auth_required":true}\r\n')
        heard.append(await reader.read(1000))
        writer.close()

    impostor = await asyncio.start_server(pretend, "127.0.0.1", 0)
    address = f"127.0.0.1:{impostor.sockets[0].getsockname()[1]}"
    for told in await refusals(
        (f"tls://me:secret@{address}", BrokerAccess()),
        (f"nats://me:secret@{address}", BrokerAccess(tls_ca=certificates.ca)),
        (nats_server.url, BrokerAccess(tls_ca=certificates.ca)),
    ):
        assert "offers no TLS" in told
    impostor.close()
    await impostor.wait_closed()
    assert heard
    assert not any(heard)


async def test_a_broker_may_ask_for_a_certificate(certificates: Certificates, tmp_path: Path) -> None:
    """A server that verifies lets in who shows a certificate of its authority, and nobody else."""
    with NatsServer(tmp_path, access=tls_block(certificates, verify=True)) as server:
        url = f"tls://{server.address}"
        bus = await NatsBus.connect(url, access=BrokerAccess(tls_ca=certificates.ca, tls_cert=certificates.client))
        await check_works(bus)
        await bus.close()
        await refusals((url, BrokerAccess(tls_ca=certificates.ca)))


def seed_file(path: Path, pair: nkeys.KeyPair) -> Path:
    """Write a seed as the `nk` tool does."""
    path.write_text(f"{pair.seed.decode()}\n")
    return path


def new_user() -> nkeys.KeyPair:
    """Return a fresh nkey of a user."""
    seed = nkeys.encode_seed(secrets.token_bytes(32), nkeys.PREFIX_BYTE_USER)
    return nkeys.from_seed(bytearray(seed))


async def test_an_nkey_opens_the_broker(tmp_path: Path) -> None:
    """The holder of the seed is let in without any password on the wire; another seed, or none, is not."""
    pair = new_user()
    users = json.dumps({"users": [{"nkey": pair.public_key.decode()}]})
    with NatsServer(tmp_path / "server", access=f"authorization: {users}\n") as server:
        url = f"nats://{server.address}"
        right = BrokerAccess(nkey_seed_file=seed_file(tmp_path / "seed", pair))
        bus = await NatsBus.connect(url, access=right)
        await check_works(bus)
        await bus.close()
        other = BrokerAccess(nkey_seed_file=seed_file(tmp_path / "other", new_user()))
        for told in await refusals((url, other), (url, BrokerAccess())):
            assert "Authorization Violation" in told


@pytest.mark.parametrize(
    ("access", "told"),
    [
        ({"nkey_seed_file": "none"}, "MELL_NATS_NKEY_SEED_FILE"),
        ({"nkey_seed_file": "junk"}, "begins with SU"),
        ({"nkey_seed_file": "broken"}, "begins with SU"),
        ({"tls_ca": "none"}, "MELL_NATS_TLS_CA"),
        ({"tls_ca": "junk"}, "MELL_NATS_TLS_CA"),
        ({"tls_cert": "junk"}, "--nats-tls-cert"),
        ({"tls_key": "junk"}, "MELL_NATS_TLS_CERT"),
    ],
)
async def test_files_that_are_none_are_told(
    nats_server: NatsServer, tmp_path: Path, access: dict[str, str], told: str
) -> None:
    """A file that is missing, or holds something else, is one line that names the setting, never the seed."""
    (tmp_path / "junk").write_text("nothing of use")
    (tmp_path / "broken").write_text("SUABC")
    files = {name: tmp_path / value for name, value in access.items()}
    with pytest.raises(BrokerUnreachableError, match=told) as caught:
        await NatsBus.connect(nats_server.url, access=BrokerAccess(**files), timeout_s=0.5)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert "SUABC" not in str(caught.value)
