import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "deploy" / "scale"

STAND_IN = """#!/bin/sh
echo "$(basename "$0") $*" >> "$CALLS"
case "$*" in
*" get "*) printf %s "$REPLICAS" ;;
*" ps "*) i=0; while [ $i -lt "$REPLICAS" ]; do echo id$i; i=$((i + 1)); done ;;
esac
"""


class Shell:
    """Runs a script where `kubectl` and `docker` are stand-ins that write down their calls."""

    def __init__(self, folder: Path, replicas: int) -> None:
        self.calls_file = folder / "calls"
        for name in ("kubectl", "docker"):
            path = folder / name
            path.write_text(STAND_IN)
            path.chmod(0o755)
        self.environment = {
            "PATH": f"{folder}:{os.environ['PATH']}",
            "CALLS": str(self.calls_file),
            "REPLICAS": str(replicas),
            "MELL_SCALER_HOST": "4f2a",
        }

    def run(self, script: str, *arguments: str) -> int:
        """Return the exit code."""
        sh = shutil.which("sh")
        assert sh is not None
        command = [sh, str(SCRIPTS / script), *arguments]
        return subprocess.run(command, env=self.environment, timeout=60, check=False).returncode

    def calls(self) -> list[str]:
        """Return the calls that change something."""
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        return [line for line in lines if " get " not in line and " ps " not in line]


@pytest.mark.parametrize(("replicas", "count", "scaled"), [(1, 3, True), (3, 3, False), (4, 3, False)])
def test_kubectl_starts_by_raising_the_number_only(tmp_path: Path, replicas: int, count: int, scaled: bool) -> None:
    """An order that comes late or twice never lowers it, and loses against a change at the same time."""
    shell = Shell(tmp_path, replicas)
    assert shell.run("kubectl.sh", "start", str(count), "gpu-worker-2") == 0
    expected = [f"kubectl --namespace mell scale statefulset/gpu-worker --current-replicas={replicas} --replicas=3"]
    assert shell.calls() == (expected if scaled else [])


def test_kubectl_stops_the_last_only(tmp_path: Path) -> None:
    """A StatefulSet stops its highest ordinal: if that is not the drained one nothing is done."""
    shell = Shell(tmp_path, 3)
    assert shell.run("kubectl.sh", "stop", "2", "gpu-worker-1") == 1
    assert shell.run("kubectl.sh", "stop", "1", "gpu-worker-2") == 1
    assert shell.calls() == []
    assert shell.run("kubectl.sh", "stop", "2", "gpu-worker-2") == 0
    assert shell.calls() == ["kubectl --namespace mell scale statefulset/gpu-worker --current-replicas=3 --replicas=2"]


@pytest.mark.parametrize(("replicas", "count"), [(1, 3), (4, 4)])
def test_compose_starts_by_raising_the_number_only(tmp_path: Path, replicas: int, count: int) -> None:
    """What runs is not made anew."""
    shell = Shell(tmp_path, replicas)
    assert shell.run("compose.sh", "start", "3", "worker-2") == 0
    scale = f"docker compose up --detach --no-deps --no-recreate --scale gpu_worker={count} gpu_worker"
    assert shell.calls() == [scale]


def test_compose_stops_this_very_container(tmp_path: Path) -> None:
    """Compose would choose one itself."""
    shell = Shell(tmp_path, 3)
    assert shell.run("compose.sh", "stop", "2", "worker") == 0
    assert shell.calls() == ["docker stop 4f2a", "docker rm 4f2a"]


@pytest.mark.parametrize("script", ["compose.sh", "kubectl.sh"])
def test_anything_else_is_told_how_to_be_called(tmp_path: Path, script: str) -> None:
    """Code 2, and nothing is changed."""
    shell = Shell(tmp_path, 1)
    assert shell.run(script, "restart", "1") == 2
    assert shell.calls() == []
