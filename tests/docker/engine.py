"""A container engine of one's own for the tests: started bare, without a registry, and removed without a trace."""

import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
_CONTEXT = ("LICENSE", "README.md", "pyproject.toml", "docker-compose.yml", ".dockerignore")
_CONTEXT_FOLDERS = ("requirements", "services", "shared")
_NO_NETWORK = ["--bridge=none", "--iptables=false", "--ip6tables=false", "--ip-forward=false", "--ip-masq=false"]
_START_S = 60.0


def command(*arguments: str, environment: Mapping[str, str] | None = None, folder: Path | None = None) -> str:
    """Run a program to its end and return its standard output; its standard error is part of a failure's message."""
    done = subprocess.run(
        arguments, env={**os.environ, **(environment or {})}, cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout


def compose_command() -> list[str]:
    """Return the compose program there is: the engine's plugin, or the older program of its own."""
    plugin = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False)
    if plugin.returncode == 0:
        return ["docker", "compose"]
    assert shutil.which("docker-compose"), "install docker-compose (Debian: apt install docker-compose)"
    return ["docker-compose"]


def engine_answers() -> bool:
    """Return whether an engine runs already that may be used."""
    assert shutil.which("docker"), "install a container engine (Debian: apt install docker.io)"
    return subprocess.run(["docker", "version"], capture_output=True, check=False).returncode == 0


@contextmanager
def own_engine(folder: Path) -> Iterator[str]:
    """Run an engine that keeps everything in `folder`; give its DOCKER_HOST. Needs root."""
    assert os.geteuid() == 0, "no container engine answers, and starting one needs root: start docker, or run as root"
    assert shutil.which("dockerd"), "install a container engine (Debian: apt install docker.io)"
    host = f"unix://{folder}/engine.sock"
    places = ["--data-root", f"{folder}/data", "--exec-root", f"{folder}/exec", "-p", f"{folder}/engine.pid"]
    with (folder / "engine.log").open("wb") as log:
        daemon = subprocess.Popen(["dockerd", *places, "-H", host, *_NO_NETWORK], stdout=log, stderr=log)
        try:
            _await_engine(daemon, host, folder / "engine.log")
            yield host
        finally:
            daemon.terminate()
            daemon.wait(_START_S)
            _unmount_under(folder)
            shutil.rmtree(folder / "data")


def import_base_image(host: str, cache: Path) -> str:
    """Return the name of a base image with python3, made with debootstrap instead of pulled from a registry."""
    archive = cache / "base.tar"
    if not archive.exists():
        assert shutil.which("debootstrap"), "install debootstrap, or set MELL_BASE_IMAGE to an image with python3"
        root = cache / "base"
        include = "--include=python3,python3-venv,ca-certificates"
        command("debootstrap", "--variant=minbase", include, "bookworm", str(root))
        command("tar", "-C", str(root), "-cf", str(archive), ".")
        shutil.rmtree(root)
    command("docker", "import", str(archive), "mell-test-base", environment={"DOCKER_HOST": host})
    return "mell-test-base"


def fill_wheelhouse(cache: Path) -> Path:
    """Return a folder with every wheel that the images need, as this environment's pip finds them."""
    constraints = REPOSITORY / "requirements" / "constraints.txt"
    asked = (REPOSITORY / "pyproject.toml").read_bytes() + constraints.read_bytes()
    wheels = cache / f"wheels-{hashlib.sha256(asked).hexdigest()[:12]}"
    if not wheels.is_dir():
        partial = cache / "wheels.partial"
        shutil.rmtree(partial, ignore_errors=True)
        what = [f"{REPOSITORY}[frontend,gpu-worker,console]", "hatchling"]
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(partial)]
        command(*pip, "-c", str(constraints), *what)
        partial.rename(wheels)
    return wheels


def copy_context(target: Path, wheels: Path | None) -> Path:
    """Return a build context with this repository's files and, if given, the wheels to build from."""
    target.mkdir()
    for name in _CONTEXT:
        shutil.copy(REPOSITORY / name, target / name)
    for name in _CONTEXT_FOLDERS:
        shutil.copytree(REPOSITORY / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    if wheels is not None:
        shutil.copytree(wheels, target / "wheels")
    return target


def _await_engine(daemon: "subprocess.Popen[bytes]", host: str, log: Path) -> None:
    deadline_s = time.monotonic() + _START_S
    while subprocess.run(["docker", "-H", host, "version"], capture_output=True, check=False).returncode:
        assert daemon.poll() is None, f"the engine does not start:\n{log.read_text()[-2000:]}"
        assert time.monotonic() < deadline_s, f"the engine does not answer:\n{log.read_text()[-2000:]}"
        time.sleep(0.1)


def _unmount_under(folder: Path) -> None:
    points = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for point in sorted((point for point in points if Path(point).is_relative_to(folder)), reverse=True):
        subprocess.run(["umount", "--lazy", point], check=False)
