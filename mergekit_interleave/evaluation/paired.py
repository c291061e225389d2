"""Estimate the difference of two models that answered the same items. Pure.

The test flips the signs of the differences: if nothing but chance tells the two models apart, each
difference is as likely with the other sign. That holds at any number of items and for any metric.
For right and wrong answers it is McNemar's exact test.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from mergekit_interleave._statistics import LEVEL, chunks

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

FLIPS = 20_000
"""How many flips of all signs are tried, where it is not possible to try every one."""

_ROUNDING = 1e-9  # relative, far above that of sums of float64


@dataclass(frozen=True)
class Pairs:
    """The values of two models on the same items.

    Attributes:
        base: The value of the base on each item.
        grown: The value of the grown model on each item.
        weights: The weight of each item in the mean, above 0.
        groups: The number of the group of each item. Items of one group depend on each other, such
            as questions about one passage.
    """

    base: Floats
    grown: Floats
    weights: Floats
    groups: Indices

    @property
    def shares(self) -> Floats:
        """The share of each item in the mean; they sum to 1."""
        return np.asarray(self.weights / self.weights.sum())

    @property
    def are_right_or_wrong(self) -> bool:
        """Whether each item counts alike, belongs to no other, and is either right or wrong."""
        values = np.concatenate((self.base, self.grown))
        return (
            bool(np.isin(values, (0, 1)).all())
            and bool((self.weights == self.weights[0]).all())
            and len(np.unique(self.groups)) == len(self.groups)
        )


@dataclass(frozen=True)
class Difference:
    """The difference of two models on the same items: grown minus base.

    Attributes:
        mean: The weighted mean of the differences.
        interval: The 95 % interval of the mean.
        deviation: The standard deviation of the difference of an item, with which `needed` finds
            the number of items for a difference. The dependence within groups is included.
        chance: The chance of a difference of this size, up or down, if only chance tells the models
            apart.
    """

    mean: float
    interval: tuple[float, float]
    deviation: float
    chance: float


def difference(pairs: Pairs, *, seed: int = 0) -> Difference:
    """Estimate the difference of two models.

    Args:
        pairs: Their values on at least two items, of at least two groups.
        seed: The seed of the sign flips.
    """
    each = pairs.grown - pairs.base
    if not each.any():
        return Difference(0.0, (0.0, 0.0), 0.0, 1.0)
    mean = float((pairs.shares * each).sum())
    error, groups = _error(pairs, each - mean)
    interval = _adjusted_wald(each) if pairs.are_right_or_wrong else _student(mean, error, groups)
    return Difference(mean, interval, error * math.sqrt(len(each)), _chance(pairs, each, seed))


def holm(chances: Sequence[float]) -> list[float]:
    """Correct chances for their number, by the method of Holm (1979).

    Calling a difference real where the result is below 5 % errs in at most 5 % of all evaluations,
    whatever the number of tests and however they depend on each other.
    """
    order = sorted(range(len(chances)), key=chances.__getitem__)
    corrected, largest = [1.0] * len(chances), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(chances) - rank) * chances[place]))
        corrected[place] = largest
    return corrected


def _error(pairs: Pairs, residuals: Floats) -> tuple[float, int]:
    """Return the standard error of the mean, and the number of groups.

    The residuals of a group are added first, so that items that depend on each other do not count
    as so many independent ones (Miller, https://arxiv.org/abs/2411.00640, section 2.2).
    """
    sums = _by_group(pairs, residuals)
    count = len(sums)
    return math.sqrt(count / (count - 1) * float(np.square(sums).sum())), count


def _by_group(pairs: Pairs, values: Floats) -> Floats:
    """Return the part of each group in the weighted mean of some values."""
    _, numbers = np.unique(pairs.groups, return_inverse=True)
    sums = np.bincount(numbers, weights=pairs.shares * values)
    return np.asarray(sums, dtype=np.float64)


def _student(mean: float, error: float, groups: int) -> tuple[float, float]:
    from scipy.special import stdtrit  # noqa: PLC0415 - mergekit requires it, `gen` does not

    half = float(stdtrit(groups - 1, 1 - LEVEL / 2)) * error
    return mean - half, mean + half


def _adjusted_wald(each: Floats) -> tuple[float, float]:
    """Return the interval of a difference of shares by Bonett and Price (2012).

    One item more is counted on each side. So the interval has a width even if few items differ or
    all of them to one side, where the usual one is much too narrow.
    """
    count = len(each) + 2
    gained, lost = ((int((each == sign).sum()) + 1) / count for sign in (1, -1))
    middle = gained - lost
    half = NormalDist().inv_cdf(1 - LEVEL / 2) * math.sqrt((gained + lost - middle**2) / count)
    return max(-1.0, middle - half), min(1.0, middle + half)


def _chance(pairs: Pairs, each: Floats, seed: int) -> float:
    """Return the two-sided chance of the mean under sign flips of whole groups."""
    parts = _by_group(pairs, each)
    sizes = np.abs(parts)
    parts = parts[sizes > _ROUNDING * sizes.max()]
    if not len(parts):  # the differences of each group cancel out
        return 1.0
    if np.ptp(np.abs(parts)) <= _ROUNDING * sizes.max():  # only their number matters
        from scipy.special import bdtr  # noqa: PLC0415

        fewer = min(int((parts > 0).sum()), int((parts < 0).sum()))
        return min(1.0, 2 * float(bdtr(fewer, len(parts), 1 / 2)))
    observed = abs(float(parts.sum())) * (1 - _ROUNDING)
    if 2 ** len(parts) <= FLIPS:
        flips = np.arange(2 ** len(parts))[:, None] >> np.arange(len(parts)) & 1
        return float((np.abs(_flipped_sums(flips, parts)) >= observed).mean())
    generator = np.random.default_rng(seed)
    reached = 0
    for rows in chunks(FLIPS, len(parts)):
        # Whole words of the generator, so that the chunks do not change what is drawn.
        bits = np.frombuffer(generator.bytes(rows * 8 * -(-len(parts) // 64)), np.uint8)
        drawn = np.unpackbits(bits.reshape(rows, -1), axis=1, count=len(parts))
        reached += int((np.abs(_flipped_sums(drawn, parts)) >= observed).sum())
    return (1 + reached) / (1 + FLIPS)


def _flipped_sums(flips: npt.NDArray[np.integer[Any]], parts: Floats) -> Floats:
    """Return the sum of the parts for each row of flips, where 1 flips the sign of a part."""
    return np.asarray(parts.sum() - 2 * (flips @ parts))
