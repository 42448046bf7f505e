"""The page of figures: blocks are replaced by name, and its tables are made from runs."""

from pathlib import Path
from xml.etree import ElementTree

import pytest

from mell_scheduler.policy import PolicySettings
from mell_scheduler.sim.evaluation import Setting, blocks_of, move_time_table, replace_block, tuned_fit
from mell_scheduler.sim.frontier import Point, frontier_svg
from mell_scheduler.sim.series import Window

SHORT = Setting("paper:0.5", 15_500, 20.0, Window(20.0, 60.0))


def test_a_block_is_replaced_and_nothing_else() -> None:
    """Text around the marks stays; a page without the marks is an error."""
    page = "a\n<!-- begin x -->\nold\n<!-- end x -->\nb\n"
    assert replace_block(page, "x", "new") == "a\n<!-- begin x -->\nnew\n<!-- end x -->\nb\n"
    with pytest.raises(ValueError, match="no block 'y'"):
        replace_block(page, "y", "new")


def test_the_page_has_every_block() -> None:
    """The command can regenerate all of the page in the tree."""
    page = Path(__file__).parents[3] / "docs" / "evaluation.md"
    text = page.read_text()
    for name in blocks_of(page, Path(), seeds=1):
        assert replace_block(text, name, "x") != text


def test_tables_are_markdown() -> None:
    """A head, a rule, and a row per policy and setting, all of one width."""
    lines = move_time_table(SHORT).splitlines()
    assert len(lines) == 2 + 8
    assert len({line.count("|") for line in lines}) == 1


def test_a_baseline_is_tuned_to_serve() -> None:
    """The head-room found hardly preempts, and no smaller figure was passed over."""
    found = tuned_fit(SHORT, "worst-fit")
    assert found is not None
    name, figures = found
    assert name.startswith("worst-fit, head-room ")
    assert figures.preemptions <= 1
    assert figures.gpu_mean <= SHORT.run("worst-fit", PolicySettings(head_room=0.5)).gpu_mean


def test_the_frontier_is_a_picture() -> None:
    """One mark per point, valid XML."""
    points = [Point("repack 0.1", 1.05, 2.0, 3_000.0, 0), Point("mell <", 1.08, 14.0, 19_000.0, 0)]
    root = ElementTree.fromstring(frontier_svg(points))
    assert len(root.findall("{http://www.w3.org/2000/svg}circle")) == 2
