import pytest

from mell_console.up import machine
from mell_console.up.machine import parse_gpus, visible_gpus

TABLE = """0, GPU-aaaa, NVIDIA H200, 143771, 143000
1, GPU-bbbb, NVIDIA H200, 143771, 100000
not, a, device
"""


def test_the_driver_s_table_becomes_devices() -> None:
    """MiB become bytes; a row that cannot be read is left out."""
    gpus = parse_gpus(TABLE)
    assert [(gpu.index, gpu.uuid, gpu.memory_bytes >> 20, gpu.free_bytes >> 20) for gpu in gpus] == [
        (0, "GPU-aaaa", 143771, 143000),
        (1, "GPU-bbbb", 143771, 100000),
    ]


@pytest.mark.parametrize(
    ("variable", "indices"),
    [(None, [0, 1]), ("1", [1]), ("1,0", [1, 0]), ("GPU-bbbb", [1]), ("", []), ("7", []), ("-1", [])],
)
def test_only_devices_that_this_process_may_see_are_shared_out(variable: str | None, indices: list[int]) -> None:
    """`CUDA_VISIBLE_DEVICES` chooses and orders devices, by index or uuid."""
    environment = {} if variable is None else {"CUDA_VISIBLE_DEVICES": variable}
    assert [gpu.index for gpu in visible_gpus(TABLE, environment)] == indices


def test_a_machine_without_driver_has_no_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """No `nvidia-smi` means no GPUs, not an error."""
    monkeypatch.setenv("PATH", "")
    assert machine.nvidia_smi() == ""


def test_this_machine_has_at_least_a_core_and_some_memory() -> None:
    """Reading the real machine gives numbers that can be divided."""
    here = machine.read_machine()
    assert here.cores >= 1
    assert 0 < here.memory_bytes < 1 << 62
