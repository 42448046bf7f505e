"""The shadow policy: fed what happens, decides nothing, and says what serving without moves would need."""

import random

import pytest

from mell_scheduler.core import CoreSettings, SchedulerCore, StartMigration
from mell_scheduler.core import shadow as shadow_module
from mell_scheduler.core.status import live_columns
from mell_scheduler.policy import PolicySettings, make_policy
from mell_scheduler.settings import SchedulerSettings
from mell_shared.messages.admin import NOWHERE, SEQUENCE_STATES, GpuUse
from mell_shared.messages.scheduler import MigrationCommitted
from tests.scheduler.script import SECOND, Row, Script

ALL = ("kv", "tokens", "hybrid")


class Shadowed(Script):
    """A script whose core compares with worst-fit; workers report what `rows` says they hold."""

    def __init__(self, policy: str = "repack", shadow: str | None = "worst-fit", **settings: int) -> None:
        super().__init__(policy, **settings)
        other = None if shadow is None else make_policy(shadow, PolicySettings())
        self.core = SchedulerCore(make_policy(policy, PolicySettings()), self.settings, self.now_us, other)
        self.rows: dict[str, list[Row]] = {}

    def use(self) -> GpuUse:
        """The meter as it stands."""
        return self.core.usage.told(self.now_us)

    def epochs(self, count: int) -> None:
        """Let epochs pass; everybody reports in each."""
        for _ in range(count):
            self.wait(1)
            for worker in self.specs:
                self.report(worker, *self.rows.get(worker, ()))

    def moving(self, count: int) -> None:
        """Let epochs pass in which every move is made at once, and workers hold what was placed, at its size."""
        for _ in range(count):
            for order in [command for command in self.wait(1) if isinstance(command, StartMigration)]:
                told = order.order
                self.send(
                    MigrationCommitted(
                        worker=told.target,
                        source=order.source,
                        migration=told.migration,
                        sequence=told.sequence,
                        generation=told.generation + 1,
                    )
                )
            for worker in self.core.ledger.workers.values():
                self.rows[worker.worker_id] = [
                    (record.sequence, record.generation, record.tokens, -(-record.tokens // 16))
                    for record in worker.sequences.values()
                ]
            for worker_id, rows in self.rows.items():
                self.report(worker_id, *rows)


def test_gpu_time_adds_up_what_is_used_and_what_is_there() -> None:
    """Two workers are up, one holds a sequence for ten seconds: 20 GPU-seconds up, 10 used, 10 by the shadow."""
    script = Shadowed()
    script.up("a", "b", migration_modes=ALL)
    script.epochs(3)
    before = script.use()
    script.ask("s")
    script.rows["a"] = [("s", 1, 160, 10)]
    script.report("a", *script.rows["a"])
    script.epochs(10)
    after = script.use()
    assert (after.up, after.used, after.shadow) == (2, 1, 1)
    assert after.up_gpu_s - before.up_gpu_s == pytest.approx(20)
    assert after.used_gpu_s - before.used_gpu_s == pytest.approx(10, abs=1.01)
    assert after.shadow_gpu_s - before.shadow_gpu_s == pytest.approx(10, abs=1.01)
    script.finish("a", "s")
    script.rows["a"] = []
    script.epochs(2)
    assert (script.use().used, script.use().shadow) == (0, 0)


def test_what_stays_behind_on_many_gpus_costs_the_shadow_more() -> None:
    """Sequences end in such a way that each GPU keeps one: what is moved together here stays apart there."""
    script = Shadowed("repack")
    script.up("a", "b", "c", migration_modes=ALL)
    script.epochs(2)
    # Four fill a GPU: the shadow's, which moves nothing, keeps one on each of its three.
    for number in range(12):
        script.ask(f"s{number}", tokens=384, output=1)
    shadow = script.core._shadow
    assert shadow is not None
    assert shadow.used == 3
    homes = {name: shadow._policy.gpu_of(name) for name in script.core.ledger.sequences}
    assert len(homes) == 12
    kept = list({home: name for name, home in homes.items()}.values())
    for name in [name for name in homes if name not in kept]:
        script.finish(script.core.ledger.sequences[name].worker.worker_id, name)
    script.moving(8)
    use = script.use()
    assert (use.used, use.shadow) == (1, 3)
    assert use.used_gpu_s < use.shadow_gpu_s


@pytest.mark.parametrize("policy", ["worst-fit", "first-fit", "best-fit", "round-robin"])
def test_a_policy_compared_with_itself_saves_nothing(policy: str) -> None:
    """The same arrivals and ends: where nothing is moved and nobody waits, both use as many GPUs, always."""
    script = Shadowed(policy, policy)
    script.up(*(f"w{number}" for number in range(12)))
    script.epochs(3)
    draw = random.Random(7)
    number = 0
    for _ in range(40):
        for _ in range(draw.randrange(4)):
            number += 1
            script.ask(f"s{number}", tokens=16 * draw.randrange(1, 30) - 1, output=1)
        for record in list(script.core.ledger.sequences.values()):
            if draw.random() < 0.1:
                script.finish(record.worker.worker_id, record.sequence)
        script.moving(1)
        assert script.core.usage.used_lately[-1] == script.core.usage.shadow_lately[-1]
    assert script.use().shadow_preemptions == 0
    assert script.use().shadow_gpu_s == pytest.approx(script.use().used_gpu_s)


def test_what_outgrows_its_gpu_there_is_placed_anew() -> None:
    """The shadow's workers would preempt: the latest goes to another GPU, and that is counted."""
    script = Shadowed("worst-fit")
    script.up("a", "b", migration_modes=ALL)
    script.epochs(3)
    script.ask("s0", tokens=400, output=1_000)
    script.ask("s1", tokens=400, output=1_000)
    shadow = script.core._shadow
    assert shadow is not None
    script.rows["a"] = [("s0", 1, 400, 25), ("s1", 1, 400, 25)]
    script.epochs(2)
    assert shadow.used == 1
    # They grow at once to more than one GPU of 100 blocks: here they are moved apart, as far as the scheduler knows.
    script.rows = {"a": [("s0", 1, 960, 60)], "b": [("s1", 2, 960, 60)]}
    script.epochs(2)
    assert shadow.used == 2
    assert script.use().shadow_preemptions == 1


def test_shared_prefixes_are_shared_there_too() -> None:
    """Ten sequences of 15 blocks that share most of them fit one GPU of 100 here, and so they do there."""
    script = Shadowed("worst-fit")
    script.up("a", migration_modes=ALL)
    script.epochs(3)
    script.rows["a"] = [(f"s{number}", 1, 240, 15) for number in range(10)]
    for _ in range(4):
        script.wait(1)
        script.report("a", *script.rows["a"], used_blocks=60, free_blocks=40)
    assert script.use().shadow_preemptions == 0
    assert script.core._shadow is not None
    assert script.core._shadow.used <= 2


def test_a_look_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tick looks at no more than it may, and all have had their turn after enough of them."""
    monkeypatch.setattr(shadow_module, "MOST_LOOKS", 5)
    script = Shadowed("worst-fit")
    script.up(*(f"w{number}" for number in range(6)), migration_modes=ALL)
    script.epochs(3)
    for number in range(12):
        script.ask(f"s{number}", tokens=700, output=1)
    shadow = script.core._shadow
    assert shadow is not None
    looked: list[str] = []
    take = shadow._resize
    monkeypatch.setattr(
        shadow, "_resize", lambda gpu, records, share: (looked.append(gpu), take(gpu, records, share))[1]
    )
    gpus = shadow._policy.gpu_ids()
    script.wait(0.1)
    assert len(looked) < len(gpus)
    script.wait(2)
    assert set(looked) == set(gpus)


def test_without_a_shadow_gpus_are_counted_all_the_same() -> None:
    """`--shadow-policy none`: nothing is compared, and nothing says so by a figure."""
    script = Shadowed(shadow=None)
    script.up("a", "b")
    script.epochs(4)
    use = script.use()
    assert (use.up, use.shadow_policy, use.shadow_gpu_s) == (2, "", 0.0)
    assert list(script.core.usage.shadow_lately) == []
    assert SchedulerSettings(_env_file=None, shadow_policy="none").make_shadow() is None


def test_only_policies_that_move_nothing_can_be_compared_with() -> None:
    """One that moves would plan moves that nobody makes."""
    with pytest.raises(ValueError, match="moves nothing"):
        SchedulerSettings(_env_file=None, shadow_policy="repack")


def test_decisions_do_not_depend_on_the_shadow() -> None:
    """The same events, the same commands, with and without it."""
    said = []
    for shadow in ("worst-fit", None):
        script = Shadowed("repack", shadow)
        script.up("a", "b", "c", migration_modes=ALL)
        commands = []
        for number in range(20):
            commands += script.ask(f"s{number}", tokens=40 * (number % 7 + 1), output=8)
            commands += script.wait(0.3)
        said.append(commands)
    assert said[0] == said[1]


def test_the_columns_say_what_the_rows_say() -> None:
    """Running, placed and waiting sequences, in one table of numbers; one not reported yet has its tokens' blocks."""
    script = Shadowed("best-fit")
    script.up("a", migration_modes=ALL)
    script.epochs(3)
    assert live_columns(script.core) == {}
    script.ask("s0", tokens=320, output=1)
    script.rows["a"] = [("s0", 1, 330, 21)]
    script.report("a", *script.rows["a"])
    script.ask("s1", tokens=160, output=1)
    script.ask("s2", tokens=1_400, output=1)
    columns = live_columns(script.core)
    assert columns == {
        "sequences": ("s0", "s1", "s2"),
        "workers": [0, 0, NOWHERE],
        "targets": [NOWHERE] * 3,
        "tokens": [330, 160, 1_400],
        "blocks": [21, 10, 0],
        "states": [SEQUENCE_STATES.index("running"), SEQUENCE_STATES.index("placed"), SEQUENCE_STATES.index("waiting")],
    }


def test_time_is_charged_as_it_passes() -> None:
    """An epoch that comes late counts as long as it took."""
    script = Shadowed()
    script.up("a")
    script.epochs(3)
    before = script.use().up_gpu_s
    script.now_us += 5 * SECOND
    script.epochs(1)
    assert script.use().up_gpu_s - before == pytest.approx(6, abs=0.2)


def test_its_own_settings_are_the_scheduler_s() -> None:
    """It keeps the head-room that the real one would have if it moved nothing."""
    settings = SchedulerSettings(_env_file=None, head_room=0.25)
    shadow = settings.make_shadow()
    assert shadow is not None
    assert shadow.name == "worst-fit"
    assert settings.policy_settings().fixed_head_room == 0.25
    assert isinstance(settings.core_settings(), CoreSettings)
