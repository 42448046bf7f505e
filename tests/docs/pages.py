"""Reads what a page tells its readers to run.

A fence is run if its language is a shell's or Python's; words after the language say how, for readers too:

    ```bash                       run to its end, with exit code 0; `code=1`: with that code
    ```bash until="some words"    started, waited for until it prints these, left running to the end of the page
    ```bash needs=gpu             not run: what it needs (docs/README.md lists the kinds)
    ```csv file=trace.csv         not run: put into this file, for what follows
    ```console                    lines after `$ ` are run; the others show what comes out and are not compared

`<!-- stands in: COMMAND -->` starts a stack that the reader has by then, as `until="Mell answers"` would.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

_FENCE = re.compile(r"^```(?P<language>[\w+-]+)(?P<words>[^\n`]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
_STANDS_IN = re.compile(r"^<!-- stands in: (?P<command>.+) -->$", re.MULTILINE)
SHELLS = {"bash", "sh", "console"}
NEEDS = {"network", "gpu", "cluster", "containers", "machines", "minutes", "terminal"}


@dataclass(frozen=True, slots=True)
class Block:
    """One thing to run, or a file to write."""

    line: int
    language: str
    text: str
    needs: str = ""
    until: str = ""
    file: str = ""
    code: int = 0

    @property
    def commands(self) -> int:
        """How many commands a reader would count: lines that begin one."""
        if self.language == "python":
            return 1
        lines = re.sub(r"\\\n", " ", re.sub(r"'[^']*'", "''", self.text)).splitlines()
        nested = ("  ", "done", "fi", "}", "#")
        return sum(bool(line.strip()) and not line.startswith(nested) for line in lines)


def read_page(path: Path) -> list[Block]:
    """Return a page's blocks in order; raises `ValueError` for words that mean nothing."""
    text = path.read_text(encoding="utf-8")
    found: list[tuple[int, Block]] = []
    for fence in _FENCE.finditer(text):
        block = _block(fence, text.count("\n", 0, fence.start()) + 1)
        if block is not None:
            found.append((fence.start(), block))
    for stands_in in _STANDS_IN.finditer(text):
        line = text.count("\n", 0, stands_in.start()) + 1
        found.append((stands_in.start(), Block(line, "bash", stands_in["command"], until="Mell answers")))
    return [block for _, block in sorted(found, key=lambda pair: pair[0])]


def _block(fence: "re.Match[str]", line: int) -> Block | None:
    language, text = fence["language"], fence["text"]
    words = dict(word.partition("=")[::2] for word in shlex.split(fence["words"]))
    unknown = set(words) - {"needs", "until", "file", "code"}
    if unknown or words.get("needs", "network") not in NEEDS:
        raise ValueError(f"line {line}: ```{language}{fence['words']}: unknown word or need")
    if language == "console":
        shown = re.findall(r"^\$ (.*(?:\\\n.*)*)$", text, re.MULTILINE)
        text = "\n".join(shown)
    if language not in SHELLS | {"python"} and "file" not in words:
        return None
    return Block(
        line,
        language,
        text,
        needs=words.get("needs", ""),
        until=words.get("until", ""),
        file=words.get("file", ""),
        code=int(words.get("code", 0)),
    )
