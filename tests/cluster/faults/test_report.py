from pathlib import Path

import pytest

from tests.cluster.faults.report import table, write

ROW = {
    "topic": "worker",
    "fault": "kill -9",
    "where": "in decode",
    "sees": "nothing",
    "test": "tests.cluster.faults.test_workers",
    "running_s": 2.06,
    "first_s": 0.7,
    "load": 3.9,
    "answers": 12,
}


def test_a_row_says_what_was_measured() -> None:
    """With the load it was measured under; rows are in the order of their topics."""
    told = table([ROW, ROW | {"topic": "none", "fault": "none", "where": "", "load": 1.0}]).splitlines()
    assert "load 1 to 4" in told[0]
    assert "24 answers" in told[2]
    assert [line.split(" | ")[0] for line in told[-2:]] == ["| none", "| worker"]
    assert told[-1] == "| worker | kill -9 | in decode | nothing | 2.1 s | 0.7 s | `faults.test_workers` |"


def test_the_page_keeps_all_but_the_table() -> None:
    """The markers stay, so that it can be written again; a page without them is told from one with."""
    page = Path("docs/reliability.md").read_text()
    once = write(page, "first table")
    assert "first table" in once
    assert write(once, "second table") == once.replace("first table", "second table")
    assert once.startswith(page.partition("<!--")[0])
    assert once.endswith(page.rpartition("-->")[2])
    with pytest.raises(AssertionError, match="no markers"):
        write("# Another page", "one")
