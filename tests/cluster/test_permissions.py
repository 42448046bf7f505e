"""The permissions that ship, on a real nats-server: each service can do its work, and nobody another's."""

import inspect
import re
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from mell_shared.broker_access import BrokerAccess, Role
from mell_shared.bus import BrokerForbidsError, Delivery, RequestTimeoutError
from mell_shared.events.data import EVENT_DATA, EventData
from mell_shared.events.store import EventRecord, Retention
from mell_shared.nats_bus import NatsBus
from mell_shared.nats_event_store import NatsEventStore
from mell_shared.nats_key_value import NatsKeyValue
from mell_shared.nats_server import NatsServer, find_binary
from mell_shared.subjects import Subjects
from tests.cluster.stack import Stack, StreamedChat, whole_text
from tests.shared.conftest import eventually

SHIPPED = Path(__file__).parents[2] / "services/console/nats"
ROLES: tuple[Role, ...] = ("frontend", "scheduler", "worker")

SUBJECTS: dict[str, tuple[set[Role], set[Role]]] = {
    # name in `Subjects`: who sends there, who listens there
    "place": ({"frontend"}, {"scheduler"}),
    "scheduler_events": ({"worker"}, {"scheduler"}),
    "worker_commands": ({"frontend", "scheduler", "worker"}, {"worker"}),
    "all_workers": ({"scheduler"}, {"worker"}),
    "worker_lanes": ({"worker"}, {"worker"}),
    "all_lanes": ({"worker"}, {"worker"}),
    "frontend_tokens": ({"worker"}, {"frontend"}),
    "frontend_control": ({"worker"}, {"frontend"}),
    "admin": ({"frontend"}, {"scheduler"}),
    "admin_status": ({"frontend"}, {"scheduler"}),
    "event": (set(), set()),  # of no known type: see below
}


def shipped_access() -> str:
    """Return what the broker's shipped configuration says of who may do what, with passwords as a user sets them."""
    conf = (SHIPPED / "nats.conf").read_text()
    users = conf[conf.index("authorization {") : conf.index("# Across machines")]
    for role in (*ROLES, "events"):
        users = users.replace(f"$MELL_NATS_{role.upper()}_PASSWORD", f"{role}-pw")
    return (SHIPPED / "permissions.conf").read_text() + users


def test_the_shipped_configuration_is_one() -> None:
    """nats-server takes the file as it stands in the image, given the passwords in its environment."""
    passwords = {f"MELL_NATS_{role.upper()}_PASSWORD": "pw" for role in (*ROLES, "events")}
    check = [str(find_binary()), "-t", "--config", str(SHIPPED / "nats.conf")]
    checked = subprocess.run(check, env=passwords, capture_output=True, text=True, check=False, timeout=60)
    assert checked.returncode == 0, checked.stderr
    assert subprocess.run(check, env={}, capture_output=True, check=False, timeout=60).returncode != 0


def test_the_monitor_is_for_the_health_check_in_the_container_only() -> None:
    """It asks nobody who they are, so no other container may reach it."""
    listens = re.findall(r"^\s*https?(?:_port)?\s*[:=]\s*(.+)$", (SHIPPED / "nats.conf").read_text(), re.MULTILINE)
    assert listens == ['"127.0.0.1:8222"']


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """A server with the shipped permissions."""
    with NatsServer(tmp_path_factory.mktemp("permissions"), access=shipped_access()) as running:
        yield running


@pytest_asyncio.fixture
async def buses(server: NatsServer) -> AsyncIterator[dict[Role, NatsBus]]:
    """A connection in each role."""
    async with AsyncExitStack() as stack:
        made = {}
        for role in ROLES:
            url = f"nats://{role}:{role}-pw@{server.address}"
            made[role] = await NatsBus.connect(url, access=BrokerAccess(role=role))
            stack.push_async_callback(made[role].close)
        yield made


def subject_named(name: str) -> str:
    """Return the subject that a member of `Subjects` stands for, of some process `x`."""
    member: Any = getattr(Subjects(), name)
    return str(member("x") if callable(member) else member)


def known_subjects() -> list[str]:
    """Return the names of all subjects there are."""
    return [name for name, _ in inspect.getmembers(Subjects) if not name.startswith("_") and name != "prefix"]


def test_every_subject_is_thought_of() -> None:
    """A new subject needs a line here, and in the permissions that ship."""
    assert set(known_subjects()) <= set(SUBJECTS)


async def may_listen(bus: NatsBus, subject: str) -> bool:
    """Whether the broker lets this connection subscribe."""

    async def ignore(_delivery: Delivery) -> None:
        return

    try:
        subscription = await bus.subscribe(subject, ignore)
    except BrokerForbidsError:
        return False
    await subscription.unsubscribe()
    return True


async def may_send(bus: NatsBus, subject: str) -> bool:
    """Whether the broker lets this connection publish."""
    before = bus.stats.forbidden
    await bus.publish(subject, b"")
    await bus.flush()
    return bus.stats.forbidden == before


@pytest.mark.parametrize("name", known_subjects())
async def test_who_may_send_and_who_may_listen(buses: dict[Role, NatsBus], name: str) -> None:
    """On each subject exactly those may send, and exactly those may listen, whose work it is."""
    senders, listeners = SUBJECTS[name]
    subject = subject_named(name)
    assert {role for role, bus in buses.items() if await may_send(bus, subject)} == senders
    assert {role for role, bus in buses.items() if await may_listen(bus, subject)} == listeners


@pytest.mark.parametrize("kind", EVENT_DATA, ids=lambda kind: kind.TYPE)
async def test_each_event_has_one_teller(buses: dict[Role, NatsBus], kind: type[EventData]) -> None:
    """Only the service whose fact it is may say so, and nobody listens past the stream."""
    subject = Subjects().event(kind.TYPE)
    assert {role for role, bus in buses.items() if await may_send(bus, subject)} == {kind.TELLER}
    assert not any([await may_listen(bus, subject) for bus in buses.values()])


async def test_the_stream_is_made_by_schedulers_and_read_by_frontends(buses: dict[Role, NatsBus]) -> None:
    """A frontend adds its events and reads all; nobody can delete, purge or consume for others."""
    record = EventRecord("frontend.state", "f/1", b"{}")
    await NatsEventStore(buses["scheduler"], Subjects(), Retention(60.0, 1_000_000)).append([])
    store = NatsEventStore(buses["frontend"], Subjects())
    assert await store.append([record]) == 1
    assert [event.body for event in await store.read(0, 10)] == [b"{}"]
    assert await store.last_position() == 1
    for role, bus in buses.items():
        for subject in ("STREAM.DELETE.MELL", "STREAM.PURGE.MELL", "STREAM.MSG.DELETE.MELL", "CONSUMER.CREATE.MELL.x"):
            assert not await may_send(bus, f"$JS.API.{subject}"), (role, subject)
    assert not await may_send(buses["worker"], "$JS.API.DIRECT.GET.MELL")


async def test_other_systems_consume_and_can_do_nothing_else(server: NatsServer) -> None:
    """Their user reads by consumers of its own; it can neither tell events nor speak to services."""
    url = f"nats://events:events-pw@{server.address}"
    bus = await NatsBus.connect(url, access=BrokerAccess(role="events"))  # type: ignore[arg-type] # no service's role
    try:
        for subject in ("CONSUMER.CREATE.MELL.x", "CONSUMER.INFO.MELL.x", "CONSUMER.MSG.NEXT.MELL.x"):
            assert await may_send(bus, f"$JS.API.{subject}"), subject
        others = [
            "$JS.API.STREAM.DELETE.MELL",
            "$JS.API.STREAM.UPDATE.MELL",
            "$JS.API.CONSUMER.CREATE.KV_mell-scheduler.x",
        ]
        for subject in [*others, *map(subject_named, known_subjects())]:
            assert not await may_send(bus, subject), subject
        for pattern in ("mell.>", "mell.events.>", "_INBOX.frontend.>"):
            assert not await may_listen(bus, pattern)
    finally:
        await bus.close()


@pytest.mark.parametrize("pattern", [">", "mell.>", "mell.*.*.tokens", "_INBOX.>", "$SYS.>", "$KV.>"])
async def test_nobody_may_listen_to_everything(buses: dict[Role, NatsBus], pattern: str) -> None:
    """Patterns wider than a role's own subjects are refused: no service can read what is meant for others."""
    assert not any([await may_listen(bus, pattern) for bus in buses.values()])


async def test_replies_reach_who_asked_and_nobody_else(buses: dict[Role, NatsBus]) -> None:
    """A reply comes to the asking role's inbox, where no other role may listen or speak of its own accord."""

    async def answer(delivery: Delivery) -> None:
        await buses["worker"].publish(delivery.reply_to, b"yes")

    await buses["worker"].subscribe("mell.worker.x.commands", answer)
    assert await buses["frontend"].request("mell.worker.x.commands", b"", 60.0) == b"yes"
    assert not await may_listen(buses["worker"], "_INBOX.frontend.>")
    assert not await may_send(buses["worker"], "_INBOX.frontend.guess")
    with pytest.raises(RequestTimeoutError):
        await buses["frontend"].request("mell.scheduler.events", b"", 0.1)


async def test_only_the_scheduler_keeps_what_operators_set(buses: dict[Role, NatsBus]) -> None:
    """In a bucket of its own, whose keys do not expire."""
    store = NatsKeyValue(buses["scheduler"], "mell-settings", 0)
    assert await store.read("moves", 60.0) is None
    revision = await store.write("moves", b"one", 0, 60.0)
    await store.write("moves", b"two", revision, 60.0)
    found = await store.read("moves", 60.0)
    assert found is not None
    assert found.value == b"two"
    for role in ("frontend", "worker"):
        assert not await may_send(buses[role], "$KV.mell-settings.moves")
    assert buses["scheduler"].stats.forbidden == 0


async def test_only_the_scheduler_holds_the_lease(buses: dict[Role, NatsBus]) -> None:
    """The scheduler can make, write, read and erase its key; nobody else can touch it, or JetStream at all."""
    store = NatsKeyValue(buses["scheduler"], "mell-scheduler", 60.0)
    revision = await store.write("leader", b"me", 0, 60.0)
    found = await store.read("leader", 60.0)
    assert found is not None
    revision = await store.write("leader", b"me", revision, 60.0)
    for role in ("frontend", "worker"):
        for subject in ("$KV.mell-scheduler.leader", "$JS.API.STREAM.DELETE.KV_mell-scheduler", "$JS.API.INFO"):
            assert not await may_send(buses[role], subject)
    for subject in ("$JS.API.STREAM.DELETE.KV_mell-scheduler", "$JS.API.STREAM.CREATE.other", "$KV.other.key"):
        assert not await may_send(buses["scheduler"], subject)
    await store.erase("leader", revision, 60.0)
    assert buses["scheduler"].stats.forbidden == 3


async def test_what_is_forbidden_is_counted(buses: dict[Role, NatsBus]) -> None:
    """An operator sees in the metrics that a service tries what it may not."""
    await buses["worker"].publish("mell.scheduler.place", b"")
    await eventually(lambda: buses["worker"].stats.forbidden == 1)
    assert buses["worker"].connected


@pytest.mark.connected
def test_real_services_do_their_work_with_their_permissions(tmp_path: Path) -> None:
    """Scheduler, worker and frontend, each with its own user, serve answers and streams without being refused once."""
    with Stack(tmp_path, access=shipped_access()) as stack:
        for module, role in (("mell_frontend", "frontend"), ("mell_scheduler", "scheduler")):
            stack.log_in(module, f"{role}:{role}-pw")
        stack.log_in("mell_gpu_worker", "worker:worker-pw")
        services = [stack.start_scheduler(), stack.start_worker("one"), stack.start_frontend()]
        for service in services:
            service.ready()
        with stack.client(services[2]) as client:
            text = whole_text(client, 40)
            assert StreamedChat(client, 40).read() == text
            assert len(client.get("/admin/status").json()["workers"]) == 1
        assert [line for service in services for line in service.lines() if "forbid" in line.lower()] == []
        stack.log_in("mell_gpu_worker", "frontend:frontend-pw")
        wrong = stack.start("mell_gpu_worker", "--engine", "fake")
        assert wrong.exit_code() == 1
        assert re.search(r"does not let this user subscribe to mell\.worker", wrong.lines()[-1])
