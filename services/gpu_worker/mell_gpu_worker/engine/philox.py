"""Philox4x32-10, the counter-based random number generator: the same numbers everywhere, with no state to move.

J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; constants and known answers from
Random123, https://github.com/DEShawResearch/random123.
"""

import numpy as np
from numpy.typing import NDArray

_MULTIPLIER_0 = np.uint64(0xD2511F53)
_MULTIPLIER_1 = np.uint64(0xCD9E8D57)
_WEYL_0 = np.uint64(0x9E3779B9)
_WEYL_1 = np.uint64(0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_ROUNDS = 10

Words = NDArray[np.uint64]
"""32-bit words, each held in 64 bits so that products do not overflow."""


def philox4x32(counter: Words, key: Words) -> Words:
    """Return 4 random words for each row: `counter` [rows, 4], `key` [rows, 2], all below 2**32."""
    c0, c1, c2, c3 = counter.T
    k0, k1 = key.T
    for _ in range(_ROUNDS):
        product_0, product_1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = (
            (product_1 >> _HALF) ^ c1 ^ k0,
            product_1 & _LOW,
            (product_0 >> _HALF) ^ c3 ^ k1,
            product_0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL_0) & _LOW, (k1 + _WEYL_1) & _LOW
    return np.stack([c0, c1, c2, c3], axis=1)


def uniforms(seeds: list[int], choices: list[int], indices: list[int]) -> NDArray[np.float64]:
    """Return one number in [0, 1) with 53 random bits for each row.

    The key is the seed (below 2**64); the counter is the output index, then the choice (each below 2**32).
    """
    seed = np.array(seeds, dtype=np.uint64)
    key = np.stack([seed & _LOW, seed >> _HALF], axis=1)
    counter = np.zeros((len(seeds), 4), dtype=np.uint64)
    counter[:, 0] = indices
    counter[:, 1] = choices
    words = philox4x32(counter, key)
    bits = ((words[:, 0] >> np.uint64(5)) << np.uint64(26)) | (words[:, 1] >> np.uint64(6))
    return bits.astype(np.float64) * 2.0**-53
