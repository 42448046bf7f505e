import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mell_console import extras
from mell_console.cli import app
from mell_gpu_worker.model_store import ModelStoreError
from tests.console.answering import answering

SERVICES = {"mell_frontend", "mell_scheduler", "mell_gpu_worker"}


def run(*arguments: str, **environment: str) -> tuple[int, str]:
    """Return the exit code and all output of `mell ARGUMENTS`."""
    result = CliRunner().invoke(app, list(arguments), env=environment)
    return result.exit_code, result.output


def test_help_needs_no_service_and_no_extra() -> None:
    """`mell --help` imports neither services nor what extras bring, so it is quick and always works."""
    code = (
        "import sys, contextlib, io\n"
        "from mell_console.cli import app\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        "    app(['--help'])\n"
        "print(sorted(name for name in sys.modules))\n"
    )
    loaded = set(eval(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout))
    heavy = SERVICES | {"fastapi", "transformers", "torch", "uvicorn", "httpx", "numpy", "nats", "pydantic"}
    assert not heavy & loaded


@pytest.mark.parametrize(
    "command", ["up", "serve", "simulate", "model", "status", "top", "doctor", "bench", "key", "version"]
)
def test_help_lists_every_command(command: str) -> None:
    """A user finds all commands from `mell --help`."""
    code, text = run("--help")
    assert code == 0
    assert f" {command} " in text


def test_shells_complete_commands() -> None:
    """The completion that `mell --install-completion` sets up knows the commands."""
    code, text = run(_MELL_COMPLETE="complete_bash", COMP_WORDS="mell s", COMP_CWORD="1")
    assert code == 0
    assert {"serve", "simulate", "status"} <= set(text.split())
    assert "doctor" not in text.split()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_installed_for_the_shell_in_use(
    shell: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`mell --install-completion` writes into the home folder what the shell reads; `--show-completion` prints it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("shellingham.detect_shell", lambda: (shell, f"/bin/{shell}"))
    code, text = run("--show-completion")
    assert code == 0
    assert f"complete_{shell}" in text
    code, text = run("--install-completion")
    assert code == 0
    assert "completion installed" in text
    written = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert any("_MELL_COMPLETE" in content for content in written)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_printed_for_any_shell(shell: str) -> None:
    """For images and scripts, where no shell is to be seen; others are refused."""
    code, text = run("completion", shell)
    assert code == 0
    assert f"_MELL_COMPLETE=complete_{shell}" in text
    assert run("completion", "tcsh")[0] == 2


def test_a_bash_takes_the_script_and_offers_commands(tmp_path: Path) -> None:
    """A real one, with a `mell` in its path."""
    mell = tmp_path / "mell"
    mell.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mell_console "$@"\n')
    mell.chmod(0o755)
    script = """
        source <(mell completion bash)
        complete -p mell > /dev/null
        COMP_WORDS=(mell sim) COMP_CWORD=1
        _mell_completion mell
        echo "offered: ${COMPREPLY[*]}"
    """
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
    }
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "offered: simulate"


def complete(words: str, url: str) -> list[str]:
    """What a bash offers at the end of a line."""
    environment = {"MELL_URL": url, "_MELL_COMPLETE": "complete_bash", "COMP_WORDS": words}
    code, text = run(**environment, COMP_CWORD=str(words.count(" ")))
    assert code == 0
    return text.split()


def test_shells_complete_workers() -> None:
    """By asking the frontend; where two have one name, by their ids; where nobody answers, not at all."""
    fields = {
        "host": "h", "model": "m", "engine": "fake", "device": "cpu", "state": "active", "kv_blocks": 1,
        "used_blocks": 0, "block_tokens": 16, "running": 0, "waiting": 0, "step_us": 0, "report_age_s": 0,
    }  # fmt: skip
    ids = {"one-1": "one", "two-1": "two", "two-2": "two"}
    workers = [{"worker": worker, "name": name, **fields} for worker, name in ids.items()]
    status = {"scheduler": "s", "policy": "p", "uptime_s": 1, "queued": 0, "placed": 0, "rejected": 0}
    with answering(200, json.dumps({**status, "workers": workers}).encode()) as (url, _):
        assert complete("mell drain ", url) == ["one", "two-1", "two-2"]
        assert complete("mell undrain t", url) == ["two-1", "two-2"]
        assert complete("mell migrate chatcmpl-1 --to o", url) == ["one"]
    assert complete("mell drain ", url) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["up"], "--workers"),
        (["bench"], "--concurrency"),
        (["serve", "frontend"], "--port"),
        (["serve", "scheduler"], "--nats-url"),
        (["serve", "gpu-worker"], "--kv-blocks"),
        (["simulate"], "policy"),
        (["status"], "--json"),
        (["doctor"], "--json"),
        (["model", "pull"], "NAME"),
        (["key"], "--tokens-per-minute"),
    ],
)
def test_each_command_shows_its_settings(arguments: list[str], words: str) -> None:
    """`--help` behind a command lists that command's flags."""
    code, text = run(*arguments, "--help")
    assert code == 0
    assert words.lower() in text.lower()


def test_flags_reach_the_service_and_its_complaint_the_user() -> None:
    """What `serve` does not know is the service's to judge."""
    code, text = run("serve", "scheduler", "--no-such-flag", "1")
    assert code == 2
    assert "--no-such-flag" in text


def test_a_missing_extra_is_one_line() -> None:
    """Without a service's packages the user reads which extra to install."""
    code = (
        "import sys\n"
        "sys.modules['uvicorn'] = None\n"
        "sys.argv = ['mell', 'serve', 'frontend']\n"
        "from mell_console.cli import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "mell: uvicorn is not installed: pip install 'mell[frontend]'\n"


def test_a_missing_module_of_ours_is_a_bug() -> None:
    """Only other people's packages can be a missing extra."""
    with pytest.raises(ModuleNotFoundError):
        extras.load("mell_scheduler.no_such_module", "scheduler")


def test_version_is_the_package_s() -> None:
    """`mell version` prints what pip knows."""
    code, text = run("version")
    assert code == 0
    assert text.startswith("mell 0.")


# --- models


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Return a model folder with two models and a half-pulled one."""
    for name, size in (("small", 10), ("org--other", 2_000_000), (".small.partial", 5)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "weights").write_bytes(bytes(size))
    return tmp_path


def test_models_are_listed_with_their_sizes(models: Path) -> None:
    """Finished models are listed by the name that serves them, half-pulled ones are not."""
    code, text = run("model", "list", "--json", MELL_MODEL_DIR=str(models))
    assert code == 0
    assert [(row["model"], row["bytes"]) for row in json.loads(text)] == [("org/other", 2_000_002), ("small", 12)]
    code, text = run("model", "list", MELL_MODEL_DIR=str(models))
    assert "org/other" in text
    assert "2 MB" in text


def test_an_empty_model_folder_says_how_to_fill_it(tmp_path: Path) -> None:
    """Nothing there is not an error."""
    code, text = run("model", "list", MELL_MODEL_DIR=str(tmp_path))
    assert code == 0
    assert "mell model pull" in text


def test_the_path_of_a_model_is_printed(models: Path) -> None:
    """`model path` is for scripts: the folder alone, or one line of advice and code 1."""
    assert run("model", "path", "org/other", MELL_MODEL_DIR=str(models)) == (0, f"{models}/org--other\n")
    code, text = run("model", "path", "none", MELL_MODEL_DIR=str(models))
    assert code == 1
    assert "mell model pull none" in text


def test_pulling_what_lies_there_prints_its_folder(models: Path) -> None:
    """A folder that holds a model needs no download."""
    assert run("model", "pull", str(models / "small")) == (0, f"{models}/small\n")


def test_the_fake_model_needs_no_pull(tmp_path: Path) -> None:
    """A stack with the fake engine goes through the same steps, and this one does nothing."""
    code, _ = run("model", "pull", "fake", MELL_MODEL_DIR=str(tmp_path))
    assert code == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("log_format", ["auto", "json", "console"])
def test_progress_and_failure_of_a_pull_are_shown(log_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way of showing progress passes the store's reason on, with code 1."""

    def pull(name: str, model_dir: Path, progress: object) -> Path:
        assert callable(progress)
        progress("downloading it", None)
        progress("downloading it", 0.5)
        raise ModelStoreError(f"no {name} in {model_dir}")

    monkeypatch.setattr("mell_console.model.pull_model", pull)
    code, text = run("model", "pull", "x", "--log-format", log_format, MELL_MODEL_DIR="/models")
    assert code == 1
    assert "mell: no x in /models" in text
    if log_format == "json":
        assert json.loads(text.splitlines()[1])["fraction"] == 0.5
    if log_format == "auto":
        assert text.count("downloading it") == 1


@pytest.mark.parametrize("service", ["frontend", "scheduler", "gpu-worker"])
def test_a_service_s_manual_says_how_it_is_called(service: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The first line of `mell serve x --help` is a command that can be typed."""
    result = CliRunner().invoke(app, ["serve", service, "--help"])
    assert (result.stdout or capsys.readouterr().out).startswith(f"usage: mell serve {service} [--flag value]...")
