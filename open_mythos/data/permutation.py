"""Shuffling in constant memory: a keyed bijection of 0..n-1, evaluated per index."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from open_mythos.checks import check_count, checked
from open_mythos.seeding import derive_seed

UInt64Array: TypeAlias = npt.NDArray[np.uint64]
Int64Array: TypeAlias = npt.NDArray[np.int64]

ROUNDS = 6


def mix64(x: UInt64Array) -> UInt64Array:
    """Apply the finalizer of SplitMix64, a bijection of 64-bit words that mixes every bit."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Permutation:
    """A pseudo-random permutation of 0..n-1, determined by ``n``, ``seed`` and ``epoch``.

    A Feistel network permutes the smallest even number of bits that holds n. Values outside 0..n-1
    are mapped again until they are inside (cycle walking, under four rounds on average), which
    preserves the bijection. Nothing is stored.

    Args:
        n: Number of elements, at least 1.
        seed: The run's seed.
        epoch: Each epoch has its own permutation.
    """

    @checked
    def __init__(self, n: int, seed: int, epoch: int) -> None:
        self.n = check_count("n", n)
        self._half_bits = np.uint64(max(1, -(-(n - 1).bit_length() // 2)))
        self._mask = (np.uint64(1) << self._half_bits) - np.uint64(1)
        self._keys = [
            np.uint64(derive_seed(seed, "data/order", epoch, round_)) for round_ in range(ROUNDS)
        ]

    def __call__(self, index: Int64Array) -> Int64Array:
        """Map ``index``, a 1-D int64 array with values in 0..n-1."""
        x = self._feistel(index.astype(np.uint64))
        outside = x >= self.n
        while outside.any():
            x[outside] = self._feistel(x[outside])
            outside = x >= self.n
        return x.astype(np.int64)

    def _feistel(self, x: UInt64Array) -> UInt64Array:
        left, right = x >> self._half_bits, x & self._mask
        for key in self._keys:
            left, right = right, left ^ (mix64(right ^ key) & self._mask)
        return (left << self._half_bits) | right
