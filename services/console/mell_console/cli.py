"""The `mell` command: parses what was asked and hands it to the module that does it, imported only then."""

import sys
from collections.abc import Callable
from enum import StrEnum
from typing import Annotated, Any

import typer

from mell_console.extras import MissingExtraError, load, needing

app = typer.Typer(
    name="mell",
    help="Serve large language models for many users on as few GPUs as possible.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
serve = typer.Typer(help="Run one service in this process.", no_args_is_help=True)
model = typer.Typer(help="Fetch models and find them.", no_args_is_help=True)
app.add_typer(serve, name="serve")
app.add_typer(model, name="model")
moves = typer.Typer(help="Moves of running requests between workers.", no_args_is_help=True)
app.add_typer(moves, name="moves")

_PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
"""For commands whose flags are a settings class: it parses them, and `--help` is its own."""

_URL = "http://127.0.0.1:8000"
Url = Annotated[str, typer.Option(envvar="MELL_URL", help="Where a frontend answers.")]
AdminKey = Annotated[
    str, typer.Option(envvar="MELL_ADMIN_KEY", help="The frontend's admin key; on its own machine it may need none.")
]


def _workers(context: typer.Context, incomplete: str) -> list[str]:
    """Complete a worker's name from those that the frontend knows of."""
    url, key = context.params.get("url") or _URL, context.params.get("admin_key") or ""
    found: list[str] = load("mell_console.admin.complete", "console").workers(url, key, incomplete)
    return found


Worker = Annotated[str, typer.Argument(help="A worker's id, or a name that only one has.", autocompletion=_workers)]
Request = Annotated[
    str, typer.Argument(help="The id of an answer (chatcmpl-...), its x-request-id, or one sequence's id.")
]


class Mode(StrEnum):
    """How a sequence's state gets to another worker."""

    AUTO = "auto"
    KV = "kv"
    TOKENS = "tokens"
    HYBRID = "hybrid"


def duration(text: str | float) -> float:
    """Return a duration such as 30s or 2m in seconds; defaults, which come through here too, are seconds."""
    if isinstance(text, float):
        return text
    try:
        return float(load("mell_console.admin.words", "console").seconds(text))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command(context_settings=_PASSED_ON)
def up(context: typer.Context) -> None:
    """Start a whole stack on this machine: broker, scheduler, workers, frontend. `--help` shows the settings."""
    raise typer.Exit(load("mell_console.up.command", "all").main(context.args))


@serve.command(context_settings=_PASSED_ON)
def frontend(context: typer.Context) -> None:
    """Answer HTTP. `--help` shows the settings."""
    _serve("mell_frontend", "frontend", context.args)


@serve.command(context_settings=_PASSED_ON)
def scheduler(context: typer.Context) -> None:
    """Place sequences on workers. `--help` shows the settings."""
    _serve("mell_scheduler", "scheduler", context.args)


@serve.command("gpu-worker", context_settings=_PASSED_ON)
def gpu_worker(context: typer.Context) -> None:
    """Run a model. `--help` shows the settings."""
    _serve("mell_gpu_worker", "gpu-worker", context.args)


@app.command(context_settings=_PASSED_ON)
def simulate(context: typer.Context) -> None:
    """Replay a trace and show how many GPUs each policy would need. `--help` shows the settings."""
    command = typer.Typer(add_completion=False)
    command.command()(load("mell_scheduler.sim.command", "scheduler").simulate_command)
    command(context.args, prog_name="mell simulate")


@app.command(context_settings=_PASSED_ON)
def bench(context: typer.Context) -> None:
    """Load an OpenAI-compatible server and report latencies and tokens per second. `--help` shows the settings."""
    raise typer.Exit(load("mell_console.bench.command", "console").main(context.args))


@app.command(context_settings=_PASSED_ON)
def scaler(context: typer.Context) -> None:
    """Start and stop workers by a command, as many as the scheduler wants. `--help` shows the settings."""
    raise typer.Exit(load("mell_console.scaler.command", "console").main(context.args))


@app.command()
def status(
    url: Url = _URL,
    admin_key: AdminKey = "",
    requests: Annotated[bool, typer.Option("--requests", help="List every sequence too.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Show the workers and what they hold, and the moves between them."""
    run = load("mell_console.status", "console").run
    _operate(url, admin_key, lambda frontend: run(frontend, requests=requests, as_json=as_json))


@app.command()
def top(
    url: Url = _URL,
    admin_key: AdminKey = "",
    once: Annotated[bool, typer.Option("--once", help="Print one state and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="A line of JSON for each state instead.")] = False,
) -> None:
    """Watch the cluster from second to second; Ctrl-C ends it. The same in a browser: /dashboard."""
    show = load("mell_console.top.command", "console").top
    _operate(url, admin_key, lambda frontend: show(frontend, once=once, as_json=as_json))


@app.command()
def drain(  # noqa: PLR0913, PLR0917 - its options are its arguments
    worker: Worker,
    deadline: Annotated[
        float | None, typer.Option(parser=duration, metavar="DURATION", help="Then what is left is placed elsewhere.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show where each sequence would go; code 1 if one finds no room.")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Until the worker is empty.")] = False,
    timeout: Annotated[
        float | None, typer.Option(parser=duration, metavar="DURATION", help="Of --wait; then the code is 3.")
    ] = None,
    url: Url = _URL,
    admin_key: AdminKey = "",
    as_json: JsonFlag = False,
) -> None:
    """Empty a worker and keep it empty: its requests move to others while they run."""
    module = load("mell_console.admin.drain", "console")
    wish = module.DrainWish(worker, deadline, dry_run, wait, timeout)
    _operate(url, admin_key, lambda frontend: module.drain(frontend, wish, as_json=as_json))


@app.command()
def undrain(worker: Worker, url: Url = _URL, admin_key: AdminKey = "", as_json: JsonFlag = False) -> None:
    """Let a drained worker take work again."""
    order = load("mell_console.admin.drain", "console").undrain
    _operate(url, admin_key, lambda frontend: order(frontend, worker, as_json=as_json))


@app.command()
def migrate(  # noqa: PLR0913, PLR0917 - its options are its arguments
    request: Request,
    to: Annotated[
        str, typer.Option("--to", help="Worker to move to: its id, or a name only one has.", autocompletion=_workers)
    ],
    mode: Annotated[Mode, typer.Option(help="How its state gets there.")] = Mode.AUTO,
    wait: Annotated[
        float, typer.Option(parser=duration, metavar="DURATION", help="How long to wait for the end; then code 3.")
    ] = 30.0,
    url: Url = _URL,
    admin_key: AdminKey = "",
    as_json: JsonFlag = False,
) -> None:
    """Move a running request to a worker; its client notices nothing."""
    module = load("mell_console.admin.migrate", "console")
    wish = module.MoveWish(to, mode.value, wait)
    _operate(url, admin_key, lambda frontend: module.migrate(frontend, request, wish, as_json=as_json))


@app.command()
def explain(request: Request, url: Url = _URL, admin_key: AdminKey = "", as_json: JsonFlag = False) -> None:
    """Show every placement and move of a request: why, and what it cost."""
    show = load("mell_console.admin.explain", "console").explain
    _operate(url, admin_key, lambda frontend: show(frontend, request, as_json=as_json))


@app.command()
def events(  # noqa: PLR0913, PLR0917 - its options are its arguments
    last: Annotated[
        int, typer.Option(min=0, max=10_000, help="How many of the past, of all types, to begin with.")
    ] = 20,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for more, until Ctrl-C.")] = False,
    kind: Annotated[str, typer.Option("--type", help="Only types like this: request.finished, worker.*")] = "*",
    url: Url = _URL,
    admin_key: AdminKey = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print CloudEvents, one JSON line each.")] = False,
) -> None:
    """Show what happened: requests, moves, workers, GPUs wanted."""
    module = load("mell_console.admin.events", "console")
    wish = module.EventsWish(last, follow, kind)
    _operate(url, admin_key, lambda frontend: module.events(frontend, wish, as_json=as_json))


@moves.command()
def pause(url: Url = _URL, admin_key: AdminKey = "", as_json: JsonFlag = False) -> None:
    """Plan no more moves, drains included, until resumed; `mell migrate` still moves."""
    _pause(url, admin_key, paused=True, as_json=as_json)


@moves.command()
def resume(url: Url = _URL, admin_key: AdminKey = "", as_json: JsonFlag = False) -> None:
    """Plan moves again."""
    _pause(url, admin_key, paused=False, as_json=as_json)


def _pause(url: str, admin_key: str, *, paused: bool, as_json: bool) -> None:
    order = load("mell_console.admin.migrate", "console").pause
    _operate(url, admin_key, lambda frontend: order(frontend, paused=paused, as_json=as_json))


def _operate(url: str, admin_key: str, work: Callable[[Any], int]) -> None:
    ask = load("mell_console.admin.ask", "console")
    raise typer.Exit(ask.command(lambda: work(ask.Frontend(url, admin_key))))


@app.command()
def doctor(
    port: Annotated[int, typer.Option(envvar="MELL_PORT", help="HTTP port that `mell up` would take.")] = 8000,
    as_json: JsonFlag = False,
) -> None:
    """Check that this machine has what Mell needs; exit code 1 if something needed is missing."""
    raise typer.Exit(load("mell_console.doctor.command", "all").run(port, as_json=as_json))


@app.command()
def key(
    name: Annotated[str, typer.Argument(help="What logs and errors call the key: letters, digits, `_`, `.`, `-`.")],
    requests_per_minute: Annotated[
        int | None, typer.Option(help="Limit of this key; default: the general one.")
    ] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(help="The same in tokens, prompt and output.")] = None,
) -> None:
    """Make an API key: `mell key team-a >> keys.toml`, then MELL_API_KEYS_FILE=keys.toml at the frontend."""
    raise typer.Exit(load("mell_console.key", "console").run(name, requests_per_minute, tokens_per_minute))


@model.command()
def pull(
    name: Annotated[str, typer.Argument(help="smollm2-135m, a hub id such as org/name, or a folder.")],
    log_format: Annotated[
        str, typer.Option(help="auto, json (a line for each step) or console.", envvar="MELL_LOG_FORMAT")
    ] = "auto",
) -> None:
    """Fetch a model into the model folder (MELL_MODEL_DIR), checked and ready to serve; print the folder."""
    raise typer.Exit(load("mell_console.model", "gpu-worker").pull(name, log_format))


@model.command("list")
def list_models(as_json: JsonFlag = False) -> None:
    """List the models that lie in the model folder."""
    raise typer.Exit(load("mell_console.model", "gpu-worker").list_models(as_json=as_json))


@model.command()
def path(name: Annotated[str, typer.Argument(help="A model's name, as given to pull.")]) -> None:
    """Print the folder that holds a model."""
    raise typer.Exit(load("mell_console.model", "gpu-worker").path(name))


class Shell(StrEnum):
    """Shells that can complete."""

    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


@app.command()
def completion(shell: Annotated[Shell, typer.Argument(help="Whose script.")]) -> None:
    """Print what completes `mell` in a shell: `source <(mell completion bash)`, or put it where the shell looks."""
    from typer.completion import get_completion_script  # type: ignore[attr-defined]  # noqa: PLC0415 - as below

    script = get_completion_script(prog_name="mell", complete_var="_MELL_COMPLETE", shell=shell.value)
    sys.stdout.write(f"{script}\n")


@app.command()
def version() -> None:
    """Print the version."""
    from importlib.metadata import version as installed  # noqa: PLC0415 - keeps `mell --help` quick

    sys.stdout.write(f"mell {installed('mell')}\n")


def _serve(package: str, extra: str, arguments: list[str]) -> None:
    with needing(extra):
        load(f"{package}.__main__", extra).main(arguments)


def main() -> None:
    """Run the command line; a missing extra is one line and exit code 1."""
    try:
        app(prog_name="mell")
    except MissingExtraError as error:
        sys.stderr.write(f"mell: {error}\n")
        raise SystemExit(1) from error
