"""What goes wrong in a run: a schedule of values, drawn from the seed, that can be thinned out one by one."""

from dataclasses import dataclass

from mell_shared.messages.base import MigrationMode
from tests.cluster.simulation.chance import Chance
from tests.cluster.simulation.clock import SECOND_US


@dataclass(frozen=True, slots=True)
class Crash:
    """A process dies without a word; a new incarnation starts `back_us` later. `quietly`: the broker learns it late."""

    at_us: int
    node: str
    back_us: int
    quietly: bool


@dataclass(frozen=True, slots=True)
class Stop:
    """A worker is told to stop (SIGTERM), and starts again `back_us` after it has gone."""

    at_us: int
    node: str
    back_us: int


@dataclass(frozen=True, slots=True)
class EngineBreak:
    """A worker's next step fails for good; it starts again `back_us` after it has gone."""

    at_us: int
    node: str
    back_us: int


@dataclass(frozen=True, slots=True)
class Drain:
    """The leader drains a worker, and takes it back `for_us` later."""

    at_us: int
    node: str
    for_us: int
    deadline_s: float | None


@dataclass(frozen=True, slots=True)
class Pause:
    """A process does nothing for a while (SIGSTOP), then everything at once."""

    at_us: int
    node: str
    for_us: int


@dataclass(frozen=True, slots=True)
class Slowness:
    """A worker's steps take `factor` times as long."""

    at_us: int
    node: str
    for_us: int
    factor: int


@dataclass(frozen=True, slots=True)
class Weather:
    """The network loses, repeats, delays; across subjects that is also reordering."""

    at_us: int
    for_us: int
    loss: float
    repeat: float
    delay_us: int


@dataclass(frozen=True, slots=True)
class Partition:
    """Two machines do not reach each other, neither through the broker nor over a link; others reach both."""

    at_us: int
    for_us: int
    one: str
    other: str


@dataclass(frozen=True, slots=True)
class BrokerGone:
    """The broker dies and comes back empty; everybody reconnects."""

    at_us: int
    for_us: int


@dataclass(frozen=True, slots=True)
class TwoLeaders:
    """The lease is wiped, so that the standby leads too; the old leader goes on for `for_us` all the same."""

    at_us: int
    for_us: int


@dataclass(frozen=True, slots=True)
class Shove:
    """A scheduler orders a move that no policy would plan: any sequence, any target, perhaps of an old generation."""

    at_us: int
    source: int
    """Which worker, and which of its sequences: counted round and round."""
    sequence: int
    target: int
    mode: MigrationMode
    split_blocks: int
    stale: bool
    for_us: int = 0


@dataclass(frozen=True, slots=True)
class LinkCut:
    """All KV transfers of a worker break off."""

    at_us: int
    node: str
    for_us: int = 0


@dataclass(frozen=True, slots=True)
class Corruption:
    """The next blocks that a worker sends are damaged on their way."""

    at_us: int
    node: str
    for_us: int = 0


Fault = (
    Crash
    | Stop
    | EngineBreak
    | Drain
    | Pause
    | Slowness
    | Weather
    | Partition
    | BrokerGone
    | TwoLeaders
    | Shove
    | LinkCut
    | Corruption
)


def end_us(fault: Fault) -> int:
    """Return when the cause of trouble is over."""
    return fault.at_us + (fault.back_us if isinstance(fault, Crash | Stop | EngineBreak) else fault.for_us)


def draw_faults(chance: Chance, nodes: list[str], horizon_us: int) -> list[Fault]:
    """Return none to ten faults and orders to move, in order of time; over soon after `horizon_us`.

    One seed in four is a storm: bad weather all the time, and many more moves.
    """
    count = chance.between(0, 10, "faults")
    faults = [_draw(chance, nodes, horizon_us, number) for number in range(count)]
    storm = chance.happens(0.25, "storm")
    if storm:
        loss, repeat = chance.between(0, 20, "loss") / 100, chance.between(0, 30, "repeat") / 100
        faults.append(Weather(2 * SECOND_US, horizon_us, loss, repeat, chance.between(0, SECOND_US // 2, "delay")))
    shoves = chance.between(30, 80, "shoves") if storm else chance.between(0, 30, "shoves")
    faults += [_shove(chance, horizon_us, number) for number in range(shoves)]
    return sorted(faults, key=lambda fault: fault.at_us)


def _draw(chance: Chance, nodes: list[str], horizon_us: int, number: int) -> Fault:  # noqa: PLR0911 - one for each kind
    def between(low: int, high: int, what: str) -> int:
        return chance.between(low, high, "fault", number, what)

    def pick(among: list[str], what: str) -> str:
        return among[between(0, len(among) - 1, what)]

    workers = [node for node in nodes if node.startswith("w")]
    at_us = between(0, horizon_us, "at")
    back_us = between(SECOND_US // 10, 4 * SECOND_US, "back")
    for_us = between(SECOND_US // 10, 7 * SECOND_US, "for")
    match between(0, 19, "kind"):
        case 0 | 1 | 2:
            return Crash(at_us, pick(nodes, "node"), back_us, quietly=bool(between(0, 1, "quietly")))
        case 3:
            return Stop(at_us, pick(workers, "node"), back_us)
        case 4:
            return EngineBreak(at_us, pick(workers, "node"), back_us)
        case 5:
            deadline_s = [None, 0.5, 3.0][between(0, 2, "deadline")]
            return Drain(at_us, pick(workers, "node"), for_us, deadline_s)
        case 6 | 7:
            return Pause(at_us, pick(nodes, "node"), for_us)
        case 8:
            return Slowness(at_us, pick(workers, "node"), for_us, between(2, 40, "factor"))
        case 9 | 10 | 11:
            loss = between(0, 30, "loss") / 100
            repeat = between(0, 30, "repeat") / 100
            return Weather(at_us, for_us, loss, repeat, between(0, SECOND_US, "delay"))
        case 12 | 13:
            one, other = pick(nodes, "one"), pick(nodes, "other")
            return Partition(at_us, for_us, one, other)
        case 14:
            return BrokerGone(at_us, between(SECOND_US // 5, 5 * SECOND_US, "gone"))
        case 15:
            return TwoLeaders(at_us, for_us)
        case 16 | 17:
            return LinkCut(at_us, pick(workers, "node"))
        case _:
            return Corruption(at_us, pick(workers, "node"))


def _shove(chance: Chance, horizon_us: int, number: int) -> Shove:
    def between(low: int, high: int, what: str) -> int:
        return chance.between(low, high, "shove", number, what)

    modes: tuple[MigrationMode, ...] = ("kv", "tokens", "hybrid")
    return Shove(
        at_us=between(3 * SECOND_US, horizon_us + SECOND_US, "at"),
        source=between(0, 59, "source"),
        sequence=between(0, 59, "sequence"),
        target=between(0, 59, "target"),
        mode=modes[between(0, 2, "mode")],
        split_blocks=between(1, 6, "split"),
        stale=between(0, 9, "stale") == 0,
    )
