"""The paper's classes of sizes, relative to a GPU's capacity C (MELL §VI-C)."""

from enum import IntEnum


class SizeClass(IntEnum):
    """L (C/2, C], M (C/3, C/2], S (C/4, C/3], T up to C/4; ordered by size."""

    T = 0
    S = 1
    M = 2
    L = 3


QUOTA = {SizeClass.M: 2, SizeClass.S: 3}
"""How many of its class an M- or S-GPU holds when it is full."""


def class_of(size: int, capacity: int) -> SizeClass:
    """The class of a size; anything at or below C/4 is T."""
    if 2 * size > capacity:
        return SizeClass.L
    if 3 * size > capacity:
        return SizeClass.M
    if 4 * size > capacity:
        return SizeClass.S
    return SizeClass.T


def is_small(size: int, capacity: int) -> bool:
    """At or below C/8: packed only as part of a multi-item."""
    return 8 * size <= capacity
