import pytest

from mell_console.up.machine import Gpu, Machine
from mell_console.up.plan import PlanError, Wish, plan_workers

GIB = 1 << 30


def gpu(index: int) -> Gpu:
    """Return a card."""
    return Gpu(index, f"GPU-{index}", "card", 80 * GIB, 79 * GIB)


def machine(cores: int, gpus: int = 0) -> Machine:
    """Return a machine with cards 0, 1, ..."""
    return Machine(cores, 16 * GIB, tuple(gpu(index) for index in range(gpus)))


@pytest.mark.parametrize(
    ("cores", "workers", "threads"), [(2, 2, 1), (16, 2, 8), (16, 3, 5), (1, 4, 1), (8, 1, 8), (7, 2, 3)]
)
def test_cores_are_shared_equally_and_nobody_gets_none(cores: int, workers: int, threads: int) -> None:
    """Threads are cores divided by workers, at least one."""
    plans = plan_workers(machine(cores), Wish(("m",), workers, "torch"))
    assert [plan.threads for plan in plans] == [threads] * workers


@pytest.mark.parametrize(
    ("gpus", "workers", "devices", "dealt", "shares"),
    [
        (0, 2, "auto", [None, None], [0.25, 0.25]),
        (2, 2, "auto", [0, 1], [0.85, 0.85]),
        (1, 2, "auto", [0, 0], [0.425, 0.425]),
        (2, 3, "auto", [0, 1, 0], [0.425, 0.85, 0.425]),
        (4, 2, "2,3", [2, 3], [0.85, 0.85]),
        (4, 2, "1", [1, 1], [0.425, 0.425]),
        (4, 1, "cpu", [None], [0.5]),
        (4, 2, "3,3,0", [3, 0], [0.85, 0.85]),
    ],
)
def test_gpus_are_dealt_in_turn_and_their_memory_is_shared_by_those_on_them(
    gpus: int, workers: int, devices: str, dealt: list[int | None], shares: list[float]
) -> None:
    """One GPU a worker where there are enough; workers on one device share what one would get."""
    plans = plan_workers(machine(16, gpus), Wish(("m",), workers, "torch", devices=devices))
    assert [plan.gpu.index if plan.gpu else None for plan in plans] == dealt
    assert [plan.memory_share for plan in plans] == pytest.approx(shares)


def test_a_share_that_is_asked_for_is_divided_too() -> None:
    """`--memory-share` is for all workers of one device together."""
    plans = plan_workers(machine(16, 1), Wish(("m",), 4, "torch", memory_share=0.8))
    assert [plan.memory_share for plan in plans] == pytest.approx([0.2] * 4)


def test_models_are_dealt_in_turn_with_their_public_names() -> None:
    """Worker i serves model i modulo the number of models, under that model's served name."""
    plans = plan_workers(machine(8), Wish(("a", "b"), 3, "torch", served_names=("x", "y")))
    assert [(plan.name, plan.model, plan.served_name) for plan in plans] == [
        ("worker-1", "a", "x"),
        ("worker-2", "b", "y"),
        ("worker-3", "a", "x"),
    ]


def test_the_fake_engine_takes_no_gpu() -> None:
    """GPUs are left alone by workers that cannot use them."""
    assert all(plan.gpu is None for plan in plan_workers(machine(8, 2), Wish(("fake",), 2, "fake")))


def test_each_vllm_server_gets_a_worker_and_no_gpu() -> None:
    """What GPUs there are, the servers have."""
    plans = plan_workers(machine(8, 2), Wish(("a",), 2, "vllm", vllm_urls=("http://a", "http://b")))
    assert [(plan.vllm_url, plan.gpu) for plan in plans] == [("http://a", None), ("http://b", None)]


@pytest.mark.parametrize(
    ("wish", "advice"),
    [
        (Wish(("a", "b", "c"), 2, "torch"), "--workers 3"),
        (Wish(("a", "b"), 2, "torch", served_names=("x",)), "one for each"),
        (Wish(("a", "a"), 2, "torch"), "named twice"),
        (Wish(("a", "b"), 2, "torch", served_names=("x", "x")), "named twice"),
        (Wish(("fake",), 2, "torch"), "--engine fake"),
        (Wish(("a",), 2, "fake"), "no model 'a'"),
        (Wish(("a",), 2, "vllm"), "name each with --vllm-url"),
        (Wish(("a",), 1, "torch", vllm_urls=("http://a",)), "for --engine vllm, not for torch"),
        (Wish(("a",), 2, "torch", devices="7"), "usable here: 0, 1"),
        (Wish(("a",), 2, "torch", devices="first"), "--devices cpu"),
        (Wish(("a",), 2, "torch", devices=","), "--devices cpu"),
    ],
)
def test_what_cannot_be_shared_out_is_refused_with_advice(wish: Wish, advice: str) -> None:
    """A wish that does not fit the machine or itself says what to change."""
    with pytest.raises(PlanError, match=advice):
        plan_workers(machine(8, 2), wish)
