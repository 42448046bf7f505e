import os
from pathlib import Path

import psutil
import pytest

from mell_shared.host import UNLIMITED, available_bytes, memory_left, usable_cores


@pytest.mark.parametrize(
    ("cpu_max", "cores"), [("200000 100000\n", 2), ("50000 100000\n", 1), ("350000 100000", 3), ("max 100000", 64)]
)
def test_a_container_s_cpu_limit_counts_in_whole_cores(
    cpu_max: str, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`cpu.max` gives whole cores, at least one, never more than the process may run on."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    (tmp_path / "cpu.max").write_text(cpu_max)
    assert usable_cores(tmp_path) == cores
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
    assert usable_cores(tmp_path) == 1


@pytest.mark.parametrize(("limit", "left"), [("max", UNLIMITED), ("5000", 3800), ("1000", 0)])
def test_a_container_s_memory_limit_counts_net_of_what_is_used(limit: str, left: int, tmp_path: Path) -> None:
    """What a control group has left is its limit less its use, never below zero; without a limit, no bound."""
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text("1200\n")
    assert memory_left(tmp_path) == left


def test_files_that_were_read_leave_their_memory_to_others(tmp_path: Path) -> None:
    """A model's weights, once read, fill the page cache: the kernel gives that up before anything fails."""
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("4900\n")
    (tmp_path / "memory.stat").write_text("anon 900\ninactive_file 3500\nactive_file 500\n")
    assert memory_left(tmp_path) == 3600


def test_a_machine_without_control_groups_has_no_such_limits(tmp_path: Path) -> None:
    """Missing files mean no limit but the machine's own."""
    assert memory_left(tmp_path) == UNLIMITED
    assert usable_cores(tmp_path) == len(os.sched_getaffinity(0))
    assert 0 < available_bytes(tmp_path) <= psutil.virtual_memory().total
