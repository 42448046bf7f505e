"""Writes the table of faults in docs/reliability.md from the rows of a run: `make reliability`."""

import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.cluster.faults.crowd import STORIES, TOKENS
from tests.cluster.faults.scene import STEP_US

_PAGE = Path("docs/reliability.md")
_BEGIN, _END = "<!-- faults: written by make reliability -->", "<!-- faults: end -->"
_TOPICS = ("none", "worker", "move", "scheduler", "broker", "frontend", "all", "restart")


def table(rows: list[dict[str, Any]]) -> str:
    """Return what stands between the markers."""
    loads = [row["load"] for row in rows]
    day, cores = datetime.now(UTC).date().isoformat(), os.cpu_count()
    answers = sum(row["answers"] for row in rows)
    lines = [
        f"{day}, {cores} cores shared with other work (load {min(loads):.0f} to {max(loads):.0f}), settings as users",
        f"have them, the fake engine with steps of {STEP_US // 1000} ms, {STORIES} clients (restarts: 6), each asking",
        f"for {TOKENS} tokens again and again: {answers:,} answers. One run of each.",
        "",
        "| what | fault | where | its clients see | longest pause in a text | longest wait for its beginning | test |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=_order):
        pause, first = f"{row['running_s']:.1f} s", f"{row['first_s']:.1f} s"
        test = row["test"].removeprefix("tests.cluster.")
        lines.append(
            f"| {row['topic']} | {row['fault']} | {row['where']} | {row['sees']} | {pause} | {first} | `{test}` |"
        )
    return "\n".join(lines)


def _order(row: dict[str, Any]) -> tuple[int, str, str]:
    return _TOPICS.index(row["topic"]), row["fault"], row["where"]


def write(page: str, between: str) -> str:
    """Return the page with what stands between its markers replaced."""
    head, _, rest = page.partition(_BEGIN)
    _, end, tail = rest.partition(_END)
    assert end, f"{_PAGE} has no markers"
    return f"{head}{_BEGIN}\n\n{between}\n\n{_END}{tail}"


def main(folder: Path) -> None:
    """Rewrite the page; a run without rows is an error."""
    rows = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    if not rows:
        sys.exit(f"no rows in {folder}: has anything been run?")
    _PAGE.write_text(write(_PAGE.read_text(), table(rows)))
    sys.stdout.write(f"{_PAGE}: {len(rows)} faults\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
