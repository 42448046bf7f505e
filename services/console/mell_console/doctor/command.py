"""`mell doctor` from its flags to its exit code."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from mell_console.doctor.checks import Check, judge
from mell_console.doctor.facts import gather

_WIDE = 200
_MARKS = {"good": "[green]✓[/green]", "could be better": "[yellow]![/yellow]", "missing": "[red]✗[/red]"}


def run(port: int, *, as_json: bool) -> int:
    """Print the diagnosis; return 1 if something needed is missing."""
    checks = judge(gather(port))
    if as_json:
        sys.stdout.write(json.dumps([asdict(check) for check in checks], indent=1) + "\n")
    else:
        console = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDE)
        console.print(as_table(checks))
    return int(any(check.verdict == "missing" for check in checks))


def as_table(checks: Sequence[Check]) -> Table:
    """Return a row for each check, with advice beneath where there is some."""
    table = Table("", "", "found", "what to do", box=None)
    for check in checks:
        table.add_row(_MARKS[check.verdict], check.name, check.found, check.advice)
    return table
