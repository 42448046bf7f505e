"""Every command in the documentation is run as a reader would, or says in its fence what it needs."""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.docs.pages import Block, read_page
from tests.docs.reader import ROOT, Reader

PAGES = [
    path.relative_to(ROOT).as_posix()
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("deploy/**/*.md")])
]
TOLD = [page for page in PAGES if read_page(ROOT / page)]


@pytest.mark.connected
@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", TOLD)
def test_what_a_page_says_works(page: str, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """Each block in order, in a folder of its own, with the stack that the page has started."""
    blocks = read_page(ROOT / page)
    ran, left = 0, Counter[str]()
    with Reader(tmp_path) as reader:
        for block in blocks:
            if block.needs:
                left[block.needs] += block.commands
                continue
            reader.run(block)
            ran += 0 if block.file else block.commands
    not_run = f"; not run: {', '.join(f'{count} ({need})' for need, count in sorted(left.items()))}" if left else ""
    record_property("told", f"{page}: {ran} commands run{not_run}")


def test_most_commands_are_run() -> None:
    """What needs more than this machine is the exception; were it not, the pages would be untested."""
    blocks = [block for page in TOLD for block in read_page(ROOT / page) if not block.file]
    assert sum(b.commands for b in blocks if not b.needs) > sum(b.commands for b in blocks if b.needs)
    assert sum(b.commands for b in blocks) > 50


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    """Files that a page links to, pictures too, and headings within pages, are there."""
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:|mailto:", link):
            continue
        path, _, heading = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page}: {link}"
        assert not heading or heading in _headings(target), f"{page}: {link}"


def _headings(page: Path) -> set[str]:
    """Return a page's anchors, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize(
    ("fence", "expected"),
    [
        ("```bash\na\nb \\\n  c\n```", Block(1, "bash", "a\nb \\\n  c\n")),
        ("```console\n$ a\nout\n$ b\n```", Block(1, "console", "a\nb")),
        ("```bash needs=gpu\na\n```", Block(1, "bash", "a\n", needs="gpu")),
        ('```bash until="it is up"\na\n```', Block(1, "bash", "a\n", until="it is up")),
        ("```csv file=t.csv\n1,2\n```", Block(1, "csv", "1,2\n", file="t.csv")),
        ("<!-- stands in: mell up -->", Block(1, "bash", "mell up", until="Mell answers")),
        ("```bash code=1\nfalse\n```", Block(1, "bash", "false\n", code=1)),
        ("```text\nnothing\n```", None),
    ],
)
def test_fences_are_read(fence: str, expected: Block | None, tmp_path: Path) -> None:
    """Each kind as the notes above the reader of pages say."""
    page = tmp_path / "page.md"
    page.write_text(f"{fence}\n")
    assert read_page(page) == ([expected] if expected else [])


@pytest.mark.parametrize("words", ["needs=luck", "need=gpu", "untl=x"])
def test_a_misspelt_word_is_an_error(words: str, tmp_path: Path) -> None:
    """Else a command would silently be run, or not."""
    (tmp_path / "page.md").write_text(f"```bash {words}\na\n```\n")
    with pytest.raises(ValueError, match="unknown"):
        read_page(tmp_path / "page.md")


def test_a_command_that_fails_is_seen(tmp_path: Path) -> None:
    """Whether its code is not the one that the page names, or it never says what it should."""
    for name in "ab":
        (tmp_path / name).mkdir()
    with Reader(tmp_path / "a") as reader, pytest.raises(AssertionError, match="code 3"):
        reader.run(Block(1, "bash", "exit 3"))
    with Reader(tmp_path / "b") as reader, pytest.raises(AssertionError, match="it ended"):
        reader.run(Block(1, "bash", "true", until="ready"))
