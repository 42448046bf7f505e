"""The `mell` command: parses what was asked and hands it to the module that does it, imported only then."""

import sys
from typing import Annotated

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

_PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
"""For commands whose flags are a settings class: it parses them, and `--help` is its own."""

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


@app.command()
def status(
    url: Annotated[
        str, typer.Option(envvar="MELL_URL", help="Where a frontend answers.", show_envvar=True)
    ] = "http://127.0.0.1:8000",
    api_key: Annotated[str, typer.Option(envvar="MELL_API_KEY", help="Bearer key, if the frontend asks for one.")] = "",
    as_json: JsonFlag = False,
) -> None:
    """Show the workers and what they hold."""
    raise typer.Exit(load("mell_console.status", "console").run(url, api_key, as_json=as_json))


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
        app()
    except MissingExtraError as error:
        sys.stderr.write(f"mell: {error}\n")
        raise SystemExit(1) from error
