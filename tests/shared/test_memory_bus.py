import asyncio
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mell_shared.bus import BusError, Delivery
from mell_shared.memory_bus import Faults, MemoryBroker
from mell_shared.testing import VirtualTimeLoop, run_virtually

PUBLISHERS, SUBJECTS, MESSAGES = 3, 4, 8

Arrival = tuple[int, str, int, int]
"""When (microseconds), subject, publisher, number."""


@dataclass
class Run:
    """What one simulated run did."""

    sent_us: dict[tuple[str, int, int], int] = field(default_factory=dict)
    arrivals: list[Arrival] = field(default_factory=list)
    outcomes: list[str] = field(default_factory=list)


def now_us() -> int:
    """Return the running loop's virtual time."""
    return round(asyncio.get_running_loop().time() * 1e6)


async def traffic(seed: int, faults: Faults) -> Run:
    """Publish numbered messages from several buses on several subjects, with a few requests between."""
    run, broker = Run(), MemoryBroker(seed=seed, faults=faults)
    target = broker.connect()

    async def keep(delivery: Delivery) -> None:
        publisher, number = delivery.data.decode().split()
        run.arrivals.append((now_us(), delivery.subject, int(publisher), int(number)))
        if delivery.reply_to:
            await target.publish(delivery.reply_to, b"ok")

    for subject in range(SUBJECTS):
        await target.subscribe(f"s.{subject}", keep)
    buses = [broker.connect() for _ in range(PUBLISHERS)]
    for number in range(MESSAGES):
        for publisher, bus in enumerate(buses):
            for subject in range(SUBJECTS):
                run.sent_us[f"s.{subject}", publisher, number] = now_us()
                await bus.publish(f"s.{subject}", f"{publisher} {number}".encode())
        await asyncio.sleep(0.001)
    for subject in range(SUBJECTS):
        run.outcomes.append(await outcome(buses[0].request(f"s.{subject}", b"0 -1", 1.0)))
    await asyncio.sleep(60)
    for bus in (target, *buses):
        await bus.close()
    return run


async def outcome(asked: object) -> str:
    """Return a request's reply or the name of its error."""
    try:
        return (await asked).decode()  # type: ignore[misc,no-any-return]
    except BusError as error:
        return type(error).__name__


delays = st.tuples(st.integers(0, 20_000), st.integers(0, 20_000)).map(sorted)
chances = st.sampled_from([0.0, 0.1, 0.5, 1.0])
faults_of_all_kinds = st.builds(
    lambda loss, duplicate, delay: Faults(loss, duplicate, delay[0], delay[1]),
    chances,
    st.sampled_from([0.0, 0.3]),
    delays,
)
seeds = st.integers(0, 2**32)


@settings(max_examples=25)
@given(seeds, faults_of_all_kinds)
def test_a_seed_fixes_the_run(seed: int, faults: Faults) -> None:
    """The same seed and faults give the same arrivals, at the same times, in the same order."""
    assert run_virtually(traffic(seed, faults)) == run_virtually(traffic(seed, faults))


@settings(max_examples=40)
@given(seeds, delays, chances)
def test_order_holds_within_subject_and_publisher(seed: int, delay: list[int], loss: float) -> None:
    """Whatever is delayed or lost, what arrives of one publisher on one subject arrives once and in order."""
    run = run_virtually(traffic(seed, Faults(loss, 0.0, *delay)))
    for subject in {arrival[1] for arrival in run.arrivals}:
        for publisher in range(PUBLISHERS):
            numbers = [a[3] for a in run.arrivals if a[1:3] == (subject, publisher) and a[3] >= 0]
            assert numbers == sorted(set(numbers))


@settings(max_examples=40)
@given(seeds, delays, st.sampled_from([0.0, 0.5]))
def test_delays_are_honoured(seed: int, delay: list[int], duplicate: float) -> None:
    """Nothing arrives before its least delay, and without copies nothing later than the longest."""
    run = run_virtually(traffic(seed, Faults(0.0, duplicate, *delay)))
    for at_us, subject, publisher, number in run.arrivals:
        if number >= 0:
            waited_us = at_us - run.sent_us[subject, publisher, number]
            assert waited_us >= delay[0]
            assert duplicate or waited_us <= delay[1] + 1


@settings(max_examples=20)
@given(seeds, faults_of_all_kinds)
def test_loss_and_copies_are_honoured(seed: int, faults: Faults) -> None:
    """Nothing is lost at chance 0, all at 1; copies come only where they are wanted, and only of what was sent."""
    run = run_virtually(traffic(seed, faults))
    arrived = [arrival[1:] for arrival in run.arrivals if arrival[3] >= 0]
    assert set(arrived) <= set(run.sent_us)
    if faults.loss == 0:
        assert set(arrived) == set(run.sent_us)
    if faults.loss == 1:
        assert not run.arrivals
        assert run.outcomes == ["RequestTimeoutError"] * SUBJECTS
    if faults.duplicate == 0:
        assert len(arrived) == len(set(arrived))
    if faults.duplicate == 0 and faults.loss == 0:
        assert run.outcomes == ["ok"] * SUBJECTS


def test_loss_and_copies_come_about_as_often_as_asked() -> None:
    """Half lost and a third repeated is what a long run shows, within wide bounds."""
    total = PUBLISHERS * SUBJECTS * MESSAGES
    lost = sum(total - len(run_virtually(traffic(seed, Faults(loss=0.5))).arrivals) for seed in range(10)) / 10
    copied = sum(len(run_virtually(traffic(seed, Faults(duplicate=0.3))).arrivals) - total for seed in range(10)) / 10
    assert 0.4 < lost / total < 0.6
    assert 0.3 < copied / total < 0.6  # copies are copied too


def test_seeds_differ_in_the_order_across_subjects() -> None:
    """Without any delay the order across subjects is the seed's, so tests meet more than one."""
    orders = {tuple(run_virtually(traffic(seed, Faults())).arrivals) for seed in range(5)}
    assert len(orders) == 5


def test_faults_may_change_in_a_run() -> None:
    """A test can begin and end a time of loss."""

    async def scenario() -> list[bytes]:
        broker, received = MemoryBroker(), []
        bus = broker.connect()

        async def keep(delivery: Delivery) -> None:
            received.append(delivery.data)

        await bus.subscribe("s", keep)
        for loss, data in ((0.0, b"1"), (1.0, b"2"), (0.0, b"3")):
            broker.faults = Faults(loss=loss)
            await bus.publish("s", data)
        await asyncio.sleep(1)
        await bus.close()
        return received

    assert run_virtually(scenario()) == [b"1", b"3"]


def test_what_is_under_way_to_a_cut_bus_is_lost() -> None:
    """A message that arrives while its receiver is disconnected is not kept for it, nor a copy of it."""

    async def scenario() -> list[bytes]:
        broker, received = MemoryBroker(faults=Faults(min_delay_us=1000, max_delay_us=1000)), []
        source, target = broker.connect(), broker.connect()

        async def keep(delivery: Delivery) -> None:
            received.append(delivery.data)

        await target.subscribe("s", keep)
        await source.publish("s", b"lost")
        target.disconnect()
        await asyncio.sleep(0.01)
        target.reconnect()
        await source.publish("s", b"kept")
        await asyncio.sleep(0.01)
        await source.close()
        await target.close()
        return received

    assert run_virtually(scenario()) == [b"kept"]


def test_virtual_time_jumps_and_tells_a_deadlock() -> None:
    """An hour's sleep takes an hour of the loop's clock; a wait that nothing can end is an error, not a hang."""

    async def sleeper() -> int:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualTimeLoop)
        before_us = loop.now_us()
        await asyncio.sleep(3600)
        return loop.now_us() - before_us

    assert run_virtually(sleeper()) == 3_600_000_000
    with pytest.raises(RuntimeError, match="deadlock"):
        run_virtually(asyncio.Event().wait())
