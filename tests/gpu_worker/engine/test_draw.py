import math
import random

import pytest
import torch

from mell_gpu_worker.engine.draw import DrawParams, draw


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
def test_draws_equal_the_plain_definition(vocab: int, spread: float) -> None:
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
    assert draw(logits, params(rows)).tolist() == expected


def test_a_row_does_not_depend_on_its_batch() -> None:
    """Each row gives the same token alone, though cuts of other rows make more candidates be sorted."""
    logits = torch.randn(40, 5000, generator=torch.Generator().manual_seed(3)) * 0.5
    source = random.Random(4)
    cuts = [(0, 1.0, 0.0), (3, 1.0, 0.0), (0, 0.3, 0.0), (0, 0.99, 0.0), (0, 1.0, 0.3), (900, 0.9, 0.01)]
    rows = [(1.0, *cuts[i % len(cuts)], source.random()) for i in range(40)]
    together = draw(logits, params(rows)).tolist()
    assert together == [draw(logits[i : i + 1], params([rows[i]])).item() for i in range(40)]


def test_frequencies_follow_the_softmax() -> None:
    """Evenly spaced uniforms give each token its share of the softmax at the row's temperature."""
    logits = torch.tensor([0.0, 1.0, -2.0, 3.0, 0.5])
    count = 20_000
    rows = [(0.7, 0, 1.0, 0.0, (i + 0.5) / count) for i in range(count)]
    shares = torch.bincount(draw(logits.expand(count, 5), params(rows)), minlength=5) / count
    assert torch.allclose(shares, (logits / 0.7).softmax(-1), atol=2 / count)


@pytest.mark.parametrize("cuts", [(0, 1.0, 0.0), (4, 0.99, 0.0)])
def test_the_ends_of_the_unit_interval(cuts: tuple[int, float, float]) -> None:
    """The least and the greatest uniform number give a token of weight, never one beyond or one ruled out."""
    logits = torch.tensor([[float("-inf"), 0.0, 0.0, -1.0, float("-inf")]] * 2)
    top_k, top_p, min_p = cuts
    ends = [(1.0, top_k, top_p, min_p, 0.0), (1.0, top_k, top_p, min_p, 1 - 2.0**-53)]
    assert draw(logits, params(ends)).tolist() == [1, 3]


def test_a_cold_row_takes_the_likeliest_token() -> None:
    """At a tiny temperature only the largest logit has weight."""
    logits = torch.tensor([[1.0, 5.0, 4.99]])
    assert draw(logits, params([(1e-4, 0, 1.0, 0.0, 0.999)])).item() == 1
