"""Fixtures of the console's tests: small programs that stand for services."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mell_console.up.child import ChildSpec

ProgramMaker = Callable[..., ChildSpec]


@pytest.fixture
def program() -> ProgramMaker:
    """Return a maker of child programs from Python source; further arguments are its `sys.argv[1:]`."""

    def make(source: str, *arguments: str, name: str = "service") -> ChildSpec:
        prelude = (
            "import json, os, signal, sys, time\n"
            "def say(event, level='info', **fields):\n"
            # In one write and past `print`, which a signal handler must not call while the program is in it.
            "    os.write(1, json.dumps({'event': event, 'level': level, **fields}).encode() + b'\\n')\n"
        )
        command = (sys.executable, "-c", prelude + source, *arguments)
        return ChildSpec(name, command, dict(os.environ))

    return make


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
