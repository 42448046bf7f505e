"""Fixtures of the console's tests: small programs that stand for services."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mell_console.up.child import ChildSpec
from tests.console.up_process import Starter, Up

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


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Starter]:
    """Return what starts a `mell up`; whatever is left of it at the end is killed."""
    started: list[Up] = []

    def begin(*flags: str, **environment: str) -> Up:
        started.append(Up(tmp_path, *flags, **environment))
        return started[-1]

    yield begin
    for up in started:
        up.process.kill()
        up.wait()
        assert up.process.stdout is not None
        up.process.stdout.close()
