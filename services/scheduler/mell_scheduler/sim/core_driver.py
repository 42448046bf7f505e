"""Drives the live `SchedulerCore` from the simulator: the same messages, as values, without codec or bus.

One unit of the simulation (a token in memory mode, a block in timed mode) is one block of one token here, so that
sizes are equal. Boundaries are without limit: what links and prefill cost is the simulator's own model.
"""

from collections.abc import Sequence
from dataclasses import replace

from mell_scheduler.core import (
    Command,
    CoreSettings,
    Event,
    LeadershipTaken,
    PlaceRequested,
    Reply,
    SchedulerCore,
    StartMigration,
    Tick,
)
from mell_scheduler.policy import PolicySettings, make_policy
from mell_scheduler.policy.base import GpuId, GpuSpec, Item, ItemId, Move, Reason
from mell_scheduler.policy.transfer import Mode
from mell_shared.messages.base import Generation
from mell_shared.messages.scheduler import (
    MigrationCommitted,
    MigrationFailed,
    Placed,
    PlaceRequest,
    SequenceFinished,
    WorkerJoined,
    WorkerLeft,
    WorkerReport,
    WorkerSpec,
)

_MODEL = "model"
_FOR_EVER_US = 1 << 60
_UNLIMITED = 1 << 50


class CoreDriver:
    """`sim.driver.Driver` through the core. Reports are exact and arrive at once; silence means idleness."""

    def __init__(
        self, name: str, settings: PolicySettings, growth_blocks: int | None = None, epoch_us: int = 1_000_000
    ) -> None:
        """`growth_blocks`: what every item is predicted to grow by in an epoch; None: learned from reports."""
        self._name = name
        self._policy_settings = settings
        self._growth_blocks = growth_blocks
        self._epoch_us = epoch_us
        self._core: SchedulerCore | None = None
        self._numbers: dict[GpuId, int] = {}
        self._specs: dict[GpuId, GpuSpec] = {}
        self._generations: dict[ItemId, Generation] = {}
        """Of the last submission or move; also those of items that ended and may come back."""
        self._placed: dict[ItemId, GpuId] = {}
        self._orders: dict[ItemId, StartMigration] = {}
        self.commands: list[Command] | None = None
        """Every command of the core, once somebody sets a list."""

    # --- the driver

    def gpu_started(self, spec: GpuSpec, now_us: int) -> None:
        """See `driver.Driver`."""
        if self._core is None:
            self._lead(spec, now_us)
        self._numbers[spec.gpu_id], self._specs[spec.gpu_id] = 0, spec
        self._tell(WorkerJoined(spec=_worker_spec(spec)), now_us)
        self.reported(spec.gpu_id, (), (), now_us)

    def gpu_stopped(self, gpu_id: GpuId, now_us: int) -> None:
        """See `driver.Driver`."""
        del self._numbers[gpu_id], self._specs[gpu_id]
        self._tell(WorkerLeft(worker=gpu_id, reason="stopped"), now_us)

    def gpus_wanted(self, queued_blocks: int) -> int:
        """See `driver.Driver`."""
        if self._core is None:
            return int(queued_blocks > 0)
        return self._core.scaling.gpus_wanted(_MODEL, queued_blocks)

    def arrived(self, item: Item, now_us: int) -> GpuId | None:
        """See `driver.Driver`."""
        if self._core is None:
            return None
        item_id = item.item_id
        waits = self._core.waiting.get(item_id) is not None
        if item_id not in self._placed:
            if not waits:
                self._generations[item_id] = self._generations.get(item_id, 0) + 1
            request = PlaceRequest.model_construct(
                sequence=item_id,
                generation=self._generations[item_id],
                frontend="simulator",
                model=_MODEL,
                prompt_tokens=item.size_blocks,
            )
            self._tell(PlaceRequested(f"{item_id} at {now_us}", request), now_us)
        return self._placed.get(item_id)

    def finished(self, item_id: ItemId, now_us: int) -> None:
        """See `driver.Driver`."""
        worker, generation = self._placed.pop(item_id), self._generations[item_id]
        self._orders.pop(item_id, None)
        self._tell(
            SequenceFinished.model_construct(worker=worker, sequence=item_id, generation=generation, reason="stop"),
            now_us,
        )

    def reported(self, gpu_id: GpuId, item_ids: Sequence[ItemId], blocks: Sequence[int], now_us: int) -> None:
        """See `driver.Driver`."""
        used = sum(blocks)
        self._numbers[gpu_id] += 1
        generations = self._generations
        report = WorkerReport.model_construct(
            worker=gpu_id,
            number=self._numbers[gpu_id],
            # Negative where it is over: the simulator reports before it relieves, a live worker never is.
            free_blocks=self._specs[gpu_id].capacity_blocks - used,
            used_blocks=used,
            sequences=tuple(item_ids),
            generations=[generations[item_id] for item_id in item_ids],
            tokens=list(blocks),
            blocks=list(blocks),
            states=[0] * len(item_ids),
        )
        self._tell(report, now_us)

    def epoch(self, now_us: int) -> list[Move]:
        """See `driver.Driver`."""
        if self._core is None:
            return []
        orders = [command for command in self._tell(Tick(), now_us) if isinstance(command, StartMigration)]
        self._orders.update((command.order.sequence, command) for command in orders)
        return [_move(command) for command in orders]

    def committed(self, move: Move, now_us: int) -> None:
        """See `driver.Driver`."""
        order = self._orders.pop(move.item_id).order
        self._generations[move.item_id] += 1
        self._placed[move.item_id] = move.target
        event = MigrationCommitted(
            worker=move.target,
            source=move.source,
            migration=order.migration,
            sequence=move.item_id,
            generation=self._generations[move.item_id],
        )
        self._tell(event, now_us)

    def failed(self, move: Move, now_us: int) -> None:
        """See `driver.Driver`."""
        order = self._orders.pop(move.item_id).order
        event = MigrationFailed(
            worker=move.source,
            migration=order.migration,
            sequence=move.item_id,
            generation=order.generation,
            reason="no_room",
        )
        self._tell(event, now_us)

    def deferred(self, move: Move, now_us: int) -> None:
        """See `driver.Driver`. The core defers by its own boundaries; one that it ordered can only fail."""
        self.failed(move, now_us)

    # --- the core

    def _lead(self, spec: GpuSpec, now_us: int) -> None:
        """Build the core as if it had led for long enough to plan moves from now on."""
        settings = core_settings(spec, self._growth_blocks, self._epoch_us)
        started_us = now_us - 2 * settings.report_interval_us
        self._core = SchedulerCore(make_policy(self._name, self._policy_settings), settings, started_us)
        self._tell(LeadershipTaken(1), now_us)

    def _tell(self, event: Event, now_us: int) -> list[Command]:
        assert self._core is not None, "a GPU comes first"
        commands = self._core.handle(event, now_us)
        for command in commands:
            if isinstance(command, Reply) and isinstance(command.reply, Placed):
                self._placed[command.sequence] = command.reply.worker
        if self.commands is not None:
            self.commands += commands
        return commands


def core_settings(spec: GpuSpec, growth_blocks: int | None, epoch_us: int) -> CoreSettings:
    """Return settings for workers that are never silent, and boundaries that nothing meets."""
    step = spec.step
    growth = (
        CoreSettings()
        if growth_blocks is None
        else CoreSettings(growth_start_tokens=growth_blocks, growth_limit_tokens=growth_blocks)
    )
    return replace(
        growth,
        report_interval_us=epoch_us,
        epoch_us=epoch_us,
        queue_wait_us=0,  # a trace's requests are all served, however long they wait
        missed_reports=_FOR_EVER_US // epoch_us,
        worker_lost_us=_FOR_EVER_US,
        worker_grace_us=_FOR_EVER_US,
        submit_timeout_us=_FOR_EVER_US,
        migration_timeout_us=_FOR_EVER_US,
        queue_renew_us=_FOR_EVER_US,
        queue_limit=1 << 30,
        tpot_target_us=0 if step is None else step.limit_ns // 1_000,
        step_base_ns=0 if step is None else step.base_ns,
        step_per_sequence_ns=0 if step is None else step.per_item_ns,
        step_per_block_ns=0 if step is None else step.per_block_ns,
        max_moves_per_epoch=_UNLIMITED,
        kv_bytes_per_token=1,
        link_bytes_per_s=_UNLIMITED,
        prefill_tokens_per_s=0,
        remembered_sequences=0,
    )


def _worker_spec(spec: GpuSpec) -> WorkerSpec:
    capacity = spec.capacity_blocks
    return WorkerSpec(
        worker=spec.gpu_id,
        name=spec.gpu_id,
        host=spec.host,
        model=_MODEL,
        engine="simulated",
        device="simulated",
        kv_layout="simulated",
        max_model_len=capacity,
        kv_blocks=capacity,
        block_tokens=1,
        max_sequences=_UNLIMITED,
        migration_modes=(Mode.KV.value,),
    )


def _move(command: StartMigration) -> Move:
    order = command.order
    return Move(order.sequence, command.source, order.target, command.blocks, Reason[order.reason.upper()])
