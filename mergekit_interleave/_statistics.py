"""Statistics that several packages need."""

from __future__ import annotations

import math
from statistics import NormalDist

LEVEL = 0.05
"""The error rate of each test, and of each two-sided interval."""

POWER = 0.8
"""The chance that a test finds the difference that it is planned for."""

CHUNK = 2**19
"""How many numbers of a large array are held at once, which is 4 MB."""


def needed(deviation: float, difference: float) -> int:
    """Return how many items show a mean difference with 80 % power, two-sided at 5 %.

    This is the formula for paired differences of Miller (https://arxiv.org/abs/2411.00640).

    Args:
        deviation: The standard deviation of the difference of an item.
        difference: The mean difference, which is not 0.
    """
    normal = NormalDist()
    quantiles = normal.inv_cdf(1 - LEVEL / 2) + normal.inv_cdf(POWER)
    return max(1, math.ceil((quantiles * deviation / difference) ** 2))


def chunks(total: int, width: int) -> list[int]:
    """Return how many of `total` rows of `width` numbers are held at once, for each chunk."""
    size = max(1, CHUNK // width)
    return [min(size, total - start) for start in range(0, total, size)]
