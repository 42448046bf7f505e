from pathlib import Path

import pytest

from mell_gpu_worker.engine import memory


@pytest.mark.parametrize(("limit", "left"), [("max", 1 << 62), ("5000", 3800), ("1000", 0)])
def test_a_containers_limit_counts(limit: str, left: int, tmp_path: Path) -> None:
    """What a control group has left is its limit less its use, never below zero; without a limit, no bound."""
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text("1200\n")
    assert memory._container_bytes(tmp_path) == left


def test_a_machine_without_control_groups_has_no_such_limit(tmp_path: Path) -> None:
    """Missing files mean no limit."""
    assert memory._container_bytes(tmp_path) == 1 << 62
