import numpy as np
import pytest

from mell_gpu_worker.engine.philox import philox4x32, uniforms


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_known_answers(counter: list[int], key: list[int], answer: list[int]) -> None:
    """The generator gives Random123's published numbers (its kat_vectors, philox4x32 with 10 rounds)."""
    words = philox4x32(np.array([counter], dtype=np.uint64), np.array([key], dtype=np.uint64))
    assert words.tolist() == [answer]


def test_uniforms_take_their_bits_from_the_first_two_words() -> None:
    """A uniform is 27 bits of the first word, then 26 of the second, as a fraction."""
    value = uniforms([0], [0], [0])[0]
    assert value == ((0x6627E8D5 >> 5) * 2**26 + (0xE169C58D >> 6)) / 2**53


def test_seed_choice_and_index_each_change_the_number() -> None:
    """Streams of different seeds (high bits too), choices and indices do not coincide."""
    seeds, choices, indices = [1, 2, 1 + (1 << 40), 1, 1], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]
    assert len(set(uniforms(seeds, choices, indices).tolist())) == 5


def test_uniforms_are_a_function_of_their_row_alone() -> None:
    """A row's number does not depend on the other rows."""
    seeds, choices, indices = [7, 2**63 - 1, 12345], [0, 4, 2**32 - 1], [0, 2**32 - 1, 17]
    together = uniforms(seeds, choices, indices).tolist()
    alone = [uniforms([s], [c], [i])[0] for s, c, i in zip(seeds, choices, indices, strict=True)]
    assert together == alone
    assert all(0 <= value < 1 for value in together)


def test_uniforms_are_uniform() -> None:
    """Ten thousand draws fill ten bins evenly (chi-squared with 9 degrees of freedom, far below the 0.1% point)."""
    counts = np.bincount((uniforms([5] * 10_000, [0] * 10_000, list(range(10_000))) * 10).astype(int), minlength=10)
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 27.9
