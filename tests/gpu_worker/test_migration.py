import asyncio
import secrets
from itertools import pairwise
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from mell_gpu_worker.transport.base import RefusedError, TransportError
from mell_gpu_worker.transport.memory import MemoryLink
from mell_shared.memory_bus import Faults, MemoryBroker
from mell_shared.messages.scheduler import MigrationCommitted, MigrationFailed
from mell_shared.messages.worker import Cancel, MigrateRefused

from .fleet import STEP_US, Fleet, play
from .streaming import Outcome

MODES: dict[str, dict[str, Any]] = {
    "kv": {"mode": "kv"},
    "tokens": {"mode": "tokens"},
    "hybrid": {"mode": "hybrid", "split_tokens": 32},
}


async def moved(fleet: Fleet, sequence: str, target: str, **order: Any) -> MigrationCommitted:
    """Move a sequence, which must succeed."""
    outcome = await fleet.frontend.move(sequence, target, **order)
    assert isinstance(outcome, MigrationCommitted), outcome
    assert fleet.frontend.streams[sequence].owner == target
    return outcome


async def stayed(fleet: Fleet, sequence: str, target: str, **order: Any) -> MigrationFailed:
    """Try to move a sequence, which must fail and change nothing for it."""
    owner = fleet.frontend.streams[sequence].owner
    outcome = await fleet.frontend.move(sequence, target, **order)
    assert isinstance(outcome, MigrationFailed), outcome
    assert (outcome.worker, fleet.frontend.streams[sequence].owner) == (owner, owner)
    return outcome


@pytest.mark.parametrize("mode", MODES)
def test_a_stream_moves_while_it_decodes(mode: str) -> None:
    """The text is what it would have been, the move is reported with what it took, and nothing is left behind."""

    async def scene(fleet: Fleet) -> None:
        await fleet.stream("a", "w1")
        told = await moved(fleet, "a", "w2", **MODES[mode])
        assert (told.worker, told.source, told.generation, told.mode) == ("w2", "w1", 2, mode)
        assert (told.copied_bytes > 0) == (mode != "tokens")
        assert (told.prefilled_tokens > 0) == (mode != "kv")
        assert len(fleet.frontend.streams["a"].tokens) < 200, "it moved in mid-stream"
        await fleet.whole("a")
        await fleet.nothing_left()

    play(scene, "w1", "w2")


@pytest.mark.parametrize("mode", MODES)
def test_a_stream_that_moves_again_and_again(mode: str) -> None:
    """Ten moves round three workers, each in mid-stream: one text, and no gap in it longer than some steps."""

    async def scene(fleet: Fleet) -> None:
        await fleet.stream("a", "w1", max_tokens=260)
        for number in range(10):
            await moved(fleet, "a", f"w{(number + 1) % 3 + 1}", **MODES[mode])
        await fleet.whole("a", max_tokens=260)
        assert fleet.frontend.streams["a"].generation == 11
        await fleet.nothing_left()
        arrived = fleet.frontend.streams["a"].arrived_us
        pauses = [after - before for before, after in pairwise(arrived)]
        assert max(pauses) <= 4 * STEP_US

    play(scene, "w1", "w2", "w3")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tokens", [0, 1, 196, 199])
def test_a_stream_moves_at_its_ends(mode: str, tokens: int) -> None:
    """During prefill, at the first token and at the last ones: it moves, or ends where it is, and is whole."""

    async def scene(fleet: Fleet) -> None:
        await fleet.start("a", "w1", max_tokens=200)
        await fleet.tokens("a", tokens)
        outcome = await fleet.frontend.move("a", "w2", **MODES[mode])
        if not isinstance(outcome, MigrationCommitted):
            assert tokens > 190
            assert getattr(outcome, "reason", None) == "ended"
        await fleet.whole("a")
        await fleet.nothing_left()

    play(scene, "w1", "w2")


def test_many_streams_move_at_once_beside_others() -> None:
    """Six of eight streams change places, in every mode; nobody's text is touched."""

    async def scene(fleet: Fleet) -> None:
        names = [f"s{number}" for number in range(8)]
        for number, name in enumerate(names):
            await fleet.stream(name, f"w{number % 2 + 1}", seed=number, max_tokens=150)
        orders = [
            (name, f"w{(number + 1) % 2 + 1}", list(MODES.values())[number % 3]) for number, name in enumerate(names)
        ]
        outcomes = await asyncio.gather(*(fleet.frontend.move(n, target, **order) for n, target, order in orders[:6]))
        assert all(isinstance(outcome, MigrationCommitted) for outcome in outcomes), outcomes
        for number, name in enumerate(names):
            await fleet.whole(name, seed=number, max_tokens=150)
        await fleet.nothing_left()

    play(scene, "w1", "w2", kv_blocks=160, max_step_tokens=128)


@pytest.mark.parametrize("seed", range(6))
def test_moves_over_a_bus_that_loses_repeats_and_delays(seed: int) -> None:
    """Whatever becomes of each move, each stream is whole, and nothing is left anywhere."""
    broker = MemoryBroker(seed=seed, faults=Faults(loss=0.1, duplicate=0.1, max_delay_us=20_000))

    async def scene(fleet: Fleet) -> None:
        for number in range(4):
            await fleet.stream(f"s{number}", "w1", seed=number, max_tokens=180)
        moves = [fleet.ordered(f"s{number}", "w2", **list(MODES.values())[number % 3]) for number in range(4)]
        await asyncio.gather(*moves)
        for number in range(4):
            await fleet.whole(f"s{number}", seed=number, max_tokens=180)
        await fleet.nothing_left()

    play(scene, "w1", "w2", broker=broker, kv_blocks=160)


def test_metrics_and_logs_tell_of_moves() -> None:
    """The target counts what arrived, with its pause and the shares of it; the source what failed."""

    async def scene(fleet: Fleet) -> None:
        await fleet.stream("a", "w1")
        await moved(fleet, "a", "w2")
        fleet.network.at_payload(0, lambda link, payload: b"\0" * len(payload))
        await stayed(fleet, "a", "w1")
        texts = {name: exposed(fleet, name) for name in ("w1", "w2")}
        assert 'mell_worker_migrations_total{mode="kv",outcome="committed"} 1.0' in texts["w2"]
        assert 'mell_worker_migrations_total{mode="kv",outcome="corrupt"} 1.0' in texts["w2"]
        for part in ("all", "tail", "claim", "first_step"):
            assert f'mell_worker_migration_pause_seconds_count{{part="{part}"}} 1.0' in texts["w2"]
        sent = [line for line in texts["w1"] if line.startswith("mell_worker_kv_sent_bytes_total ")]
        received = [line for line in texts["w2"] if line.startswith("mell_worker_kv_received_bytes_total ")]
        assert float(sent[0].split()[1]) == float(received[0].split()[1]) > 0
        assert 'mell_worker_link_failures_total{reason="corrupt"} 1.0' in texts["w2"]

    play(scene, "w1", "w2")


def exposed(fleet: Fleet, name: str) -> list[str]:
    """A worker's metrics as Prometheus gets them."""
    registry = CollectorRegistry()
    registry.register(fleet.workers[name].service.collector())
    return generate_latest(registry).decode().splitlines()


# --- what bad input gets


async def goes_on(fleet: Fleet, outcome: Outcome, *reasons: str) -> None:
    """The move failed for a reason; the stream is whole all the same, can still be moved, and nothing is left."""
    assert isinstance(outcome, MigrationFailed)
    assert outcome.reason in reasons, outcome
    assert outcome.message
    fleet.network.touch = lambda link: None
    await fleet.whole("a", max_tokens=400)
    for worker in fleet.workers.values():
        assert not worker.task.done(), "the worker is alive"
    await fleet.nothing_left()


@pytest.mark.parametrize("number", [0, 3])
@pytest.mark.parametrize(
    ("damage", "reasons"),
    [
        (lambda link, payload: bytes([payload[0] ^ 1]) + payload[1:], ("corrupt",)),
        (lambda link, payload: payload[:-1], ("link", "corrupt")),
        (lambda link, payload: b"", ("link", "corrupt")),
        (lambda link, payload: payload + b"more", ("link", "corrupt")),
    ],
    ids=["corrupted", "truncated", "empty", "too long"],
)
def test_a_chunk_that_arrives_damaged_aborts_the_move(number: int, damage: Any, reasons: tuple[str, ...]) -> None:
    """Whichever chunk it is: the target frees what it held, the request goes on where it was."""

    async def scene(fleet: Fleet) -> None:
        await fleet.stream("a", "w1", max_tokens=400)
        fleet.network.at_payload(number, damage)
        await goes_on(fleet, await stayed(fleet, "a", "w2"), *reasons)

    play(scene, "w1", "w2", transport={"chunk_bytes": 256})


def cut(link: MemoryLink, payload: bytes) -> bytes:
    """The connection breaks."""
    link.close()
    return payload


def stop(link: MemoryLink, payload: bytes) -> bytes:
    """The peer stands still: nothing arrives any more, and no connection breaks."""
    link.out.stop()
    link.back.stop()
    return payload


@pytest.mark.parametrize(("happen", "reasons"), [(cut, ("link",)), (stop, ("timeout",))], ids=["cut", "stopped"])
@pytest.mark.parametrize("number", [0, 3])
def test_a_link_that_breaks_or_stands_still_aborts_the_move(number: int, happen: Any, reasons: tuple[str, ...]) -> None:
    """A stopped peer is given up after a while, a lost one at once."""

    async def scene(fleet: Fleet) -> None:
        await fleet.stream("a", "w1", max_tokens=400)
        fleet.network.at_payload(number, happen)
        await goes_on(fleet, await stayed(fleet, "a", "w2"), *reasons)

    play(scene, "w1", "w2", transport={"chunk_bytes": 256}, move_timeout_s=1.0)


def test_a_target_that_cannot_be_reached_or_does_not_answer() -> None:
    """Nobody there; a data port that nobody listens on; a port that never answers."""

    async def scene(fleet: Fleet) -> None:
        await fleet.stream("a", "w1", max_tokens=400)
        assert (await stayed(fleet, "a", "nobody")).reason == "unreachable"
        fleet.network.touch = lambda link: stop(link, b"") and None
        assert (await stayed(fleet, "a", "w2")).reason == "timeout"
        fleet.network.forget(fleet.transports["w2"].address)
        await goes_on(fleet, await stayed(fleet, "a", "w2"), "unreachable")

    play(scene, "w1", "w2", move_timeout_s=1.0)


def test_a_target_that_vanishes_in_mid_copy() -> None:
    """Its process is gone: the source goes on, the frontend notices nothing."""

    async def scene(fleet: Fleet) -> None:
        await fleet.stream("a", "w1", max_tokens=400)

        def vanish(link: MemoryLink, payload: bytes) -> bytes:
            fleet.workers["w2"].task.cancel()
            return payload

        fleet.network.at_payload(1, vanish)
        outcome = await stayed(fleet, "a", "w2")
        assert outcome.reason in {"link", "unreachable", "timeout"}
        del fleet.workers["w2"]
        await fleet.whole("a", max_tokens=400)
        await fleet.nothing_left()

    play(scene, "w1", "w2", transport={"chunk_bytes": 256})


def test_a_target_of_another_layout_refuses() -> None:
    """Blocks of another size are not interchangeable: refused by name before anything is held."""

    async def scene(fleet: Fleet) -> None:
        await fleet.stream("a", "w1", max_tokens=400)
        async with fleet.worker("other", block_tokens=8):
            await goes_on(fleet, await stayed(fleet, "a", "other"), "unsupported")

    play(scene, "w1", "w2")


def test_a_transfer_over_the_limit_is_refused() -> None:
    """The target's limit on a transfer holds for what it offers itself."""

    async def scene(fleet: Fleet) -> None:
        await fleet.stream("a", "w1", max_tokens=400)
        async with fleet.worker("small", transport={"max_transfer_bytes": 512}):
            outcome = await stayed(fleet, "a", "small")
            assert "over the limit" in outcome.message
            await goes_on(fleet, outcome, "busy")

    play(scene, "w1")


def test_a_move_in_a_mode_that_a_worker_does_not_have() -> None:
    """Refused at once, by the source; by the target if it is the one."""

    async def scene(fleet: Fleet) -> None:
        await fleet.stream("a", "w1", max_tokens=400)
        async with fleet.worker("still", migration_modes=[]):
            assert (await stayed(fleet, "a", "still", mode="kv")).reason == "unsupported"
        refused = await fleet.frontend.move("a", "w1", mode="kv")
        assert isinstance(refused, MigrateRefused)
        await fleet.whole("a", max_tokens=400)

    play(scene, "w1")


def test_strangers_at_the_data_port_change_nothing() -> None:
    """Rubbish, silence, a wrong secret and a wrong size are turned away, told of, and no move notices."""

    async def scene(fleet: Fleet) -> None:
        await fleet.stream("a", "w1", max_tokens=400)
        there = fleet.transports["w2"]
        before = fleet.workers["w2"].service.core.batcher.pool.free_blocks
        silent, loud = await fleet.network.open_link(there.address), await fleet.network.open_link(there.address)
        await loud.out.put(secrets.token_bytes(64))
        for size_bytes in (1, 2**62):
            with pytest.raises(RefusedError):
                await fleet.transports["w1"].connect(there.address, secrets.token_bytes(32), size_bytes, 5.0)
        assert fleet.workers["w2"].service.core.batcher.pool.free_blocks == before
        await moved(fleet, "a", "w2")
        await asyncio.sleep(2.0)
        assert sorted(set(fleet.told)) == ["transport_refused", "transport_stranger_turned_away"]
        with pytest.raises(TransportError):
            await silent.receive_frame()
        await fleet.whole("a", max_tokens=400)
        await fleet.nothing_left()

    play(scene, "w1", "w2")


def test_a_cancelled_stream_leaves_nothing_in_mid_move() -> None:
    """Cancelled between two chunks: the move fails, both ends are empty."""

    async def scene(fleet: Fleet) -> None:
        await fleet.stream("a", "w1", max_tokens=400)
        cancelled: list[asyncio.Task[Any]] = []

        def cancel(link: MemoryLink, payload: bytes) -> bytes:
            command = fleet.frontend.command("w1", Cancel(sequence="a", generation=1))
            cancelled.append(asyncio.create_task(command))
            return payload

        fleet.network.at_payload(1, cancel)
        outcome = await fleet.frontend.move("a", "w2")
        assert cancelled
        assert isinstance(outcome, MigrationFailed | MigrationCommitted)
        if isinstance(outcome, MigrationFailed):
            assert outcome.reason == "ended"
        await cancelled[0]
        del fleet.frontend.streams["a"]
        await fleet.nothing_left()

    play(scene, "w1", "w2", transport={"chunk_bytes": 256})


def test_a_worker_that_stops_in_mid_move_leaves_in_order() -> None:
    """Source and target told to stop at once: the stream ends somewhere, whole or given back; both leave cleanly."""

    async def scene(fleet: Fleet) -> None:
        await fleet.stream("a", "w1", max_tokens=60)

        def end(link: MemoryLink, payload: bytes) -> bytes:
            for worker in fleet.workers.values():
                worker.stop.set()
            return payload

        fleet.network.at_payload(1, end)
        await fleet.frontend.move("a", "w2")
        for worker in fleet.workers.values():
            await worker.task
            assert worker.service.transfers == 0
        assert fleet.frontend.streams["a"].finish or fleet.frontend.evicted

    play(scene, "w1", "w2", transport={"chunk_bytes": 256})
