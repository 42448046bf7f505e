import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mell_gpu_worker.engine.draw import Drawing, DrawParams
from mell_gpu_worker.engine.native import build
from mell_gpu_worker.engine.native.build import load_library
from mell_gpu_worker.engine.native.draw import NativeDraw

Draw = Callable[[torch.Tensor, DrawParams], torch.Tensor]
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, build._COMPILERS)), reason="no C++ compiler: apt-get install g++"
)


def draw(logits: torch.Tensor, params: DrawParams) -> torch.Tensor:
    """Draw with torch."""
    drawing = Drawing(logits, params)
    return drawing.finish(drawing.complete.numpy())


@pytest.fixture(scope="module", params=["torch", pytest.param("native", marks=needs_compiler)])
def drawing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Draw:
    """Each way to draw."""
    if request.param == "torch":
        return draw
    return NativeDraw(load_library(tmp_path_factory.mktemp("native")), threads=2)


def plain_draw(logits: list[float], temperature: float, cuts: tuple[int, float, float], uniform: float) -> int:
    """The definition in the module's docstring, token by token, in Python integers."""
    top_k, top_p, min_p = cuts
    scaled = [logit / temperature for logit in logits]
    largest = max(scaled)
    weights = [math.floor(2**40 * math.exp(value - largest)) for value in scaled]
    order = list(range(len(weights)))
    if top_k > 0 or top_p < 1 or min_p > 0:
        order.sort(key=lambda token: (-weights[token], token))
        order = order[: top_k or None]
        total, seen, kept = sum(weights[token] for token in order), 0, []
        for token in order:
            if seen < top_p * total and weights[token] >= min_p * weights[order[0]]:
                kept.append(token)
            seen += weights[token]
        order = kept
    total = sum(weights[token] for token in order)
    target = min(math.floor(uniform * total), total - 1)
    for token in order:
        target -= weights[token]
        if target < 0:
            return token
    raise AssertionError


def params(rows: list[tuple[float, int, float, float, float]]) -> DrawParams:
    """Build parameters from (temperature, top_k, top_p, min_p, uniform) rows."""
    temperature, top_k, top_p, min_p, uniform = zip(*rows, strict=True)
    double = torch.float64
    return DrawParams(
        torch.tensor(temperature, dtype=double),
        torch.tensor(top_k),
        torch.tensor(top_p, dtype=double),
        torch.tensor(min_p, dtype=double),
        torch.tensor(uniform, dtype=double),
    )


@pytest.mark.parametrize("vocab", [7, 300, 2000])
@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_draws_equal_the_plain_definition(drawing: Draw, vocab: int, spread: float) -> None:
    """Random rows with random cuts give the tokens of the plain definition, flat distributions too."""
    source = random.Random(vocab)
    rows = [
        (
            source.choice([0.3, 1.0, 2.0]),
            source.choice([0, 0, 1, 5, 600]),
            source.choice([1.0, 0.9, 0.5, 0.01]),
            source.choice([0.0, 0.0, 0.05, 0.5, 1.0]),
            source.random(),
        )
        for _ in range(60)
    ]
    logits = (torch.randn(60, vocab, generator=torch.Generator().manual_seed(vocab)) * spread).round(decimals=1)
    expected = [plain_draw(row, t, (k, p, m), u) for row, (t, k, p, m, u) in zip(logits.tolist(), rows, strict=True)]
    assert drawing(logits, params(rows)).tolist() == expected


def test_a_row_does_not_depend_on_its_batch(drawing: Draw) -> None:
    """Each row gives the same token alone, though cuts of other rows make more candidates be sorted."""
    logits = torch.randn(40, 5000, generator=torch.Generator().manual_seed(3)) * 0.5
    source = random.Random(4)
    cuts = [(0, 1.0, 0.0), (3, 1.0, 0.0), (0, 0.3, 0.0), (0, 0.99, 0.0), (0, 1.0, 0.3), (900, 0.9, 0.01)]
    rows = [(1.0, *cuts[i % len(cuts)], source.random()) for i in range(40)]
    together = drawing(logits, params(rows)).tolist()
    assert together == [drawing(logits[i : i + 1], params([rows[i]])).item() for i in range(40)]


def test_frequencies_follow_the_softmax(drawing: Draw) -> None:
    """Evenly spaced uniforms give each token its share of the softmax at the row's temperature."""
    logits = torch.tensor([0.0, 1.0, -2.0, 3.0, 0.5])
    count = 20_000
    rows = [(0.7, 0, 1.0, 0.0, (i + 0.5) / count) for i in range(count)]
    shares = torch.bincount(drawing(logits.expand(count, 5), params(rows)), minlength=5) / count
    assert torch.allclose(shares, (logits / 0.7).softmax(-1), atol=2 / count)


@pytest.mark.parametrize("cuts", [(0, 1.0, 0.0), (4, 0.99, 0.0)])
def test_the_ends_of_the_unit_interval(drawing: Draw, cuts: tuple[int, float, float]) -> None:
    """The least and the greatest uniform number give a token of weight, never one beyond or one ruled out."""
    logits = torch.tensor([[float("-inf"), 0.0, 0.0, -1.0, float("-inf")]] * 2)
    top_k, top_p, min_p = cuts
    ends = [(1.0, top_k, top_p, min_p, 0.0), (1.0, top_k, top_p, min_p, 1 - 2.0**-53)]
    assert drawing(logits, params(ends)).tolist() == [1, 3]


def test_a_cold_row_takes_the_likeliest_token(drawing: Draw) -> None:
    """At a tiny temperature only the largest logit has weight."""
    logits = torch.tensor([[1.0, 5.0, 4.99]])
    assert drawing(logits, params([(1e-4, 0, 1.0, 0.0, 0.999)])).item() == 1


@needs_compiler
def test_drawing_in_cpp_is_drawing_in_python(tmp_path: Path) -> None:
    """The same tokens for rows as models give them, with every kind of cut, and for rows that mean nothing."""
    native = NativeDraw(load_library(tmp_path), threads=2)
    made, source = torch.Generator().manual_seed(1), random.Random(2)
    logits = torch.randn(300, 49_152, generator=made) * 3
    logits[:, :200] += 12 * torch.rand(300, 200, generator=made)
    logits[5, 100:] = float("-inf")
    logits[6] = 0.0
    logits[7], logits[8, 3], logits[9, 4] = float("-inf"), float("nan"), float("inf")
    rows = [
        (
            source.choice([0.01, 0.5, 0.8, 1.0, 3.0]),
            source.choice([0, 0, 1, 40, 100_000]),
            source.choice([1.0, 0.95, 0.5]),
            source.choice([0.0, 0.0, 0.1]),
            source.random(),
        )
        for _ in range(300)
    ]
    meaningless = [7, 8, 9]
    found, expected = native(logits, params(rows)), draw(logits, params(rows))
    assert [i for i in range(300) if found[i] != expected[i] and i not in meaningless] == []
    assert all(0 <= found[i] < 49_152 for i in meaningless)
