"""The command line of the simulator; the console mounts `simulate_command` as `mell simulate`."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from time import perf_counter_ns
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from mell_scheduler.policy import POLICY_NAMES, PolicySettings, check_policy
from mell_scheduler.sim.hardware import MODELS, HardwareError, capacity_tokens
from mell_scheduler.sim.html import as_html
from mell_scheduler.sim.memory import DecisionLog, MemorySettings
from mell_scheduler.sim.report import Report, as_table
from mell_scheduler.sim.requests import Scaling
from mell_scheduler.sim.roofline import Roofline
from mell_scheduler.sim.simulate import DEFAULT_POLICIES, Simulation, bare_policy, live_core, simulate
from mell_scheduler.sim.simulate_timed import TimedSimulation, as_timed_table, simulate_timed
from mell_scheduler.sim.timed import Slo, TimedSettings
from mell_scheduler.sim.trace import TraceError


class Mode(StrEnum):
    """What is simulated."""

    MEMORY = "memory"
    TIMED = "timed"


class Switch(StrEnum):
    """A flag that reads on or off."""

    ON = "on"
    OFF = "off"


class Through(StrEnum):
    """What decides in the simulation."""

    CORE = "core"
    POLICY = "policy"


_POSITIVE = 1e-9
_LARGE = 1e6
"""Above this a factor or a time is a slip of the keyboard, infinity included."""
_LONGEST_S = 366.0 * 24 * 3600
_STDOUT = Path("-")


def simulate_command(  # noqa: PLR0913, PLR0917 - one parameter per flag
    trace: Annotated[
        str, typer.Argument(help="A trace file (CSV, Azure's CSV, Mooncake's JSON lines, .gz), -, or paper:RATE.")
    ],
    policy: Annotated[
        str, typer.Option(help=f"Policies, by commas, of: {', '.join(POLICY_NAMES)}, module:class.")
    ] = ",".join(DEFAULT_POLICIES),
    capacity_tokens_: Annotated[
        int | None, typer.Option("--capacity-tokens", min=1, help="Tokens of KV cache that one GPU holds.")
    ] = None,
    model: Annotated[str, typer.Option(help="Model, for the capacity, by name.")] = "llama-2-13b",
    gpu: Annotated[str, typer.Option(help="GPU, for the capacity, by name.")] = "a100-40",
    gpus_per_instance: Annotated[int, typer.Option(min=1, help="GPUs that one model instance spans.")] = 1,
    decode_tokens_per_s: Annotated[
        float, typer.Option(min=_POSITIVE, max=_LARGE, help="Memory: growth of each running request.")
    ] = 20.0,
    mode: Annotated[Mode, typer.Option(help="memory: the paper's; timed: with latency.")] = Mode.MEMORY,
    equal_slo: Annotated[
        bool, typer.Option("--equal-slo", help="Timed: search head-room and spares at equal objectives.")
    ] = False,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="With --equal-slo: the highest rate that so many GPUs serve.")
    ] = None,
    slo: Annotated[
        str, typer.Option(help="Timed: TTFT, TPOT and p99 gap objectives, as multiples of the unloaded values.")
    ] = "5,1.5,5",
    spares: Annotated[int, typer.Option(min=0, help="Timed: warm GPUs kept beside those wanted.")] = 1,
    gpu_start_s: Annotated[
        float, typer.Option(min=0.0, max=_LARGE, help="Timed: how long a GPU takes to start.")
    ] = 30.0,
    link_gbit_per_s: Annotated[
        float, typer.Option(min=_POSITIVE, max=_LARGE, help="Timed: each instance's link.")
    ] = 10.0,
    prefix_cache: Annotated[
        Switch, typer.Option(help="Timed: reuse equal prefixes that the trace's hash_ids name.")
    ] = Switch.ON,
    through: Annotated[
        Through, typer.Option(help="policy: alone, faster; core: inside the scheduler core that runs live.")
    ] = Through.POLICY,
    epoch_s: Annotated[float, typer.Option(min=0.01, max=_LARGE, help="Time between two plans of moves.")] = 1.0,
    move_s: Annotated[
        float, typer.Option(min=0.0, max=_LARGE, help="Memory: time a move holds memory at both ends.")
    ] = 0.0,
    max_growth_tokens: Annotated[
        int | None, typer.Option(min=0, help="Most that a request is predicted to grow in an epoch and a move.")
    ] = None,
    head_room: Annotated[float, typer.Option(min=0.0, max=0.9, help="Share of a GPU arrivals leave free.")] = 0.0,
    time_scale: Annotated[float, typer.Option(min=_POSITIVE, max=_LARGE, help="Multiplies arrival times.")] = 1.0,
    length_scale: Annotated[
        float, typer.Option(min=_POSITIVE, max=_LARGE, help="Multiplies prompt and output lengths.")
    ] = 1.0,
    copies: Annotated[int, typer.Option(min=1, help="Copies of the trace over itself, shifted at random.")] = 1,
    seed: Annotated[int, typer.Option(help="Fixes everything that is sampled.")] = 0,
    warmup_s: Annotated[float, typer.Option(min=0.0, max=_LONGEST_S, help="Means start here.")] = 0.0,
    until_s: Annotated[float | None, typer.Option(min=_POSITIVE, max=_LONGEST_S, help="The run ends here.")] = None,
    json_: Annotated[
        Path | None, typer.Option("--json", help="Write the figures here; - prints them instead of the table.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with plots here.")] = None,
    save_decisions: Annotated[Path | None, typer.Option(help="Write each decision here, as JSON lines.")] = None,
) -> None:
    """Replay a trace and show how many GPUs each policy would need, with which moves."""
    console = Console(stderr=json_ == _STDOUT)
    try:
        search = _Search(equal_slo, gpus)
        search.check(mode)
        common = _Common(trace, _policies(policy), Scaling(time_scale, length_scale, copies, seed), warmup_s, until_s)
        common = replace(common, settings=PolicySettings(head_room=head_room), through=through)
        outputs = _Outputs(json_, html, save_decisions)
        outputs.check()
        if mode is Mode.TIMED:
            timed = TimedSettings(
                _roofline(model, gpu, gpus_per_instance, capacity_tokens_),
                slo=_slo(slo),
                epoch_s=epoch_s,
                gpu_start_s=gpu_start_s,
                spares=spares,
                link_bytes_per_s=link_gbit_per_s * 1e9 / 8,
                prefix_cache=prefix_cache is Switch.ON,
                max_growth_tokens=max_growth_tokens,
            )
            _run_timed(console, common, timed, search, outputs)
        else:
            known = MODELS.get(model)
            kv_bytes = None if known is None else known.kv_bytes_per_token
            common = replace(common, kv_bytes_per_token=kv_bytes)
            capacity = capacity_tokens_ or capacity_tokens(model, gpu, gpus_per_instance)
            memory = MemorySettings(capacity, decode_tokens_per_s, epoch_s, move_s, max_growth_tokens=max_growth_tokens)
            _run_memory(console, common, memory, outputs)
    except (TraceError, HardwareError, OSError, ValueError) as error:
        Console(stderr=True).print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None


def _run_memory(console: Console, common: "_Common", memory: MemorySettings, outputs: "_Outputs") -> None:
    simulation = Simulation(
        common.trace,
        memory,
        common.policies,
        common.scaling,
        common.warmup_s,
        common.until_s,
        common.settings,
        common.kv_bytes_per_token,
    )
    with _decision_log(outputs.decisions) as log, _progress(console) as progress:
        make_driver = (
            live_core(memory.epoch_s, memory.predicted_growth) if common.through is Through.CORE else bare_policy
        )
        report = simulate(simulation, perf_counter_ns, progress, log, make_driver)
    console.print(as_table(report))
    outputs.write(report.as_json(), report)


def _run_timed(
    console: Console, common: "_Common", timed: TimedSettings, search: "_Search", outputs: "_Outputs"
) -> None:
    simulation = TimedSimulation(
        common.trace,
        timed,
        common.policies,
        common.scaling,
        common.warmup_s,
        common.until_s,
        common.settings,
        search.equal_slo,
        search.gpus,
    )
    with _decision_log(outputs.decisions) as log, _progress(console) as progress:
        make_driver = live_core(timed.epoch_s) if common.through is Through.CORE else bare_policy
        report = simulate_timed(simulation, progress, make_driver, perf_counter_ns, log)
    console.print(as_timed_table(report))
    outputs.write(report.as_json(), report.report)


@dataclass(frozen=True, slots=True)
class _Search:
    """What timed mode looks for; `gpus`: the highest rate on so many, else the fewest GPU-hours."""

    equal_slo: bool
    gpus: int | None

    def check(self, mode: Mode) -> None:
        """Raise ValueError for flags that say nothing together."""
        if mode is Mode.MEMORY and (self.equal_slo or self.gpus is not None):
            raise ValueError("--equal-slo and --gpus judge latency, which memory mode lacks: give --mode timed too")
        if self.gpus is not None and not self.equal_slo:
            raise ValueError("--gpus N asks for the highest rate at equal objectives: give --equal-slo too")


@dataclass(frozen=True, slots=True)
class _Common:
    """What both modes take."""

    trace: str
    policies: tuple[str, ...]
    scaling: Scaling
    warmup_s: float
    until_s: float | None
    settings: PolicySettings = field(default_factory=PolicySettings)
    through: Through = Through.POLICY
    kv_bytes_per_token: int | None = None


@dataclass(frozen=True, slots=True)
class _Outputs:
    """Files to write besides the table."""

    json: Path | None
    html: Path | None
    decisions: Path | None

    def check(self) -> None:
        """Before minutes of simulation: raises ValueError for a file that cannot be written."""
        for path in (self.json, self.html, self.decisions):
            if path is not None and path != _STDOUT:
                try:
                    path.open("a").close()
                except OSError as error:
                    raise ValueError(f"cannot write {path}: {error.strerror}") from error

    def write(self, figures: dict[str, object], report: Report) -> None:
        """Those that were asked for."""
        if self.json == _STDOUT:
            typer.echo(json.dumps(figures, indent=2))
        elif self.json is not None:
            self.json.write_text(json.dumps(figures, indent=2) + "\n")
        if self.html is not None:
            self.html.write_text(as_html(report))


def _roofline(model: str, gpu: str, gpus: int, capacity: int | None) -> Roofline:
    roofline = Roofline.of(model, gpu, gpus)
    return roofline if capacity is None else replace(roofline, capacity_tokens=capacity)


def _slo(text: str) -> Slo:
    parts = text.split(",")
    try:
        values = [float(part) for part in parts]
    except ValueError:
        values = []
    if len(values) != 3 or not all(1.0 <= value < 1e6 for value in values):
        raise ValueError(f"--slo {text!r}: expected three multiples of at least 1, as 5,1.5,5")
    return Slo(*values)


def _policies(names: str) -> tuple[str, ...]:
    chosen = tuple(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    if not chosen:
        raise ValueError(f"unknown policy: choose of {', '.join(POLICY_NAMES)}")
    for name in chosen:
        check_policy(name)
    return chosen


@contextmanager
def _decision_log(path: Path | None) -> Iterator[DecisionLog | None]:
    if path is None:
        yield None
        return
    with path.open("w") as file:

        def write(record: dict[str, object]) -> None:
            file.write(json.dumps(record) + "\n")

        yield write


class _Bar:
    """The bar of the run that is under way, in simulated seconds."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._run = ""
        self._task: TaskID | None = None
        self._shown_s = 0.0

    def __call__(self, run: str, now_s: float, until_s: float) -> None:
        if self._task is None or run != self._run or now_s < self._shown_s:
            if self._task is not None:
                self._progress.remove_task(self._task)
            self._task = self._progress.add_task(run, total=until_s)
            self._run, self._shown_s = run, 0.0
        if now_s - self._shown_s >= until_s / 200:
            self._shown_s = now_s
            self._progress.update(self._task, completed=now_s)


@contextmanager
def _progress(console: Console) -> Iterator[_Bar]:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield _Bar(progress)
