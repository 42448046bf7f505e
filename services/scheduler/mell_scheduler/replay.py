"""`python -m mell_scheduler.replay FILE`: decide a logged run again and print every command, one JSON line each."""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from mell_scheduler.core import Command
from mell_scheduler.core.journal import JournalError, replay
from mell_shared.messages.base import Message


def lines(journal: Iterable[str]) -> Iterator[str]:
    """Return a line for each command: when, upon which event, what. Raises `JournalError`."""
    for now_us, event, commands in replay(journal):
        for command in commands:
            yield command_line(now_us, type(event).__name__, command)


def command_line(now_us: int, cause: str, command: Command) -> str:
    """Return one command as JSON; equal commands give equal lines."""
    return json.dumps({"at_us": now_us, "cause": cause, "command": type(command).__name__, **_plain(command)})


def _plain(value: Any) -> Any:
    if isinstance(value, Message):
        return value.model_dump(mode="json")
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    return value


def main(arguments: list[str]) -> int:
    """Print the commands; returns 1, with one line on stderr, if the file is no journal."""
    parser = argparse.ArgumentParser(prog="python -m mell_scheduler.replay", description=__doc__)
    parser.add_argument("file", type=Path, help="what a scheduler wrote with --event-log")
    path: Path = parser.parse_args(arguments).file
    try:
        with path.open(encoding="utf-8") as journal:
            for line in lines(journal):
                sys.stdout.write(f"{line}\n")
    except (OSError, JournalError, UnicodeDecodeError) as error:
        sys.stderr.write(f"mell: {path}: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
