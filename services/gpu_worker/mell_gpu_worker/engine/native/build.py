"""Compiles the C++ beside this file into a cache folder, once a machine, and loads it.

A plain C interface instead of a torch extension: no torch headers, so it builds in seconds and does not depend on
torch's version. OpenMP is the one that torch has loaded already (the same library name): one set of threads.
"""

import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from mell_gpu_worker.engine.native.structs import Decoder, Draw, Layer, Pool, Step

_SOURCE = Path(__file__).parent / "decoder.cpp"
# Aligned, for where the loops of a product happened to lie was worth a tenth of a step.
_ALIGNED = ("-falign-functions=64", "-falign-loops=64")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", *_ALIGNED)
_COMPILERS = ("c++", "g++", "clang++")
_BUILD_TIMEOUT_S = 300


class NativeUnavailableError(Exception):
    """There is no native step on this machine; the message says why."""


def default_cache_dir() -> Path:
    """Return the folder that compiled libraries are kept in."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mell" / "native"


def load_library(cache: Path) -> ctypes.CDLL:
    """Return the library, built if need be (seconds). Raises `NativeUnavailableError`."""
    compiler = _find_compiler()
    path = cache / f"decoder-{_digest(compiler)}.so"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            _build_once(compiler, path)
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeUnavailableError(f"cannot build or load {path}: {error}") from error
    _check_layout(library)
    return library


def _find_compiler() -> str:
    names = (os.environ["CXX"],) if os.environ.get("CXX") else _COMPILERS
    for name in names:
        if found := shutil.which(name):
            return found
    raise NativeUnavailableError(f"no C++ compiler ({', '.join(names)})")


def _digest(compiler: str) -> str:
    """Return what tells builds apart: sources, flags, compiler, processor (a home folder may be shared by machines)."""
    digest = hashlib.sha256(f"{_FLAGS} {compiler} {Path(compiler).stat().st_mtime_ns} {_processor()}".encode())
    for file in [*sorted(_SOURCE.parent.glob("*.h")), _SOURCE]:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:24]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def _build_once(compiler: str, path: Path) -> None:
    """Build `path` unless another process does: it is waited for. Ends of the holder release the lock."""
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            _build(compiler, path)


def _build(compiler: str, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        target = Path(folder) / path.name
        command = [compiler, *_FLAGS, str(_SOURCE), "-o", str(target)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_TIMEOUT_S, check=False)  # noqa: S603
        except subprocess.TimeoutExpired as error:
            raise NativeUnavailableError(f"{compiler} took longer than {_BUILD_TIMEOUT_S} s") from error
        if done.returncode:
            faults = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()[:1]
            raise NativeUnavailableError(f"{compiler} failed: {faults[0] if faults else done.returncode}")
        # Whole or not at all, for whoever looks without the lock.
        target.replace(path)


def _check_layout(library: ctypes.CDLL) -> None:
    sizes = (ctypes.c_int64 * 5)()
    library.mell_sizes(sizes)
    assert list(sizes) == [ctypes.sizeof(kind) for kind in (Layer, Decoder, Pool, Step, Draw)], list(sizes)
