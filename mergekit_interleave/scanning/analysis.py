"""Find the layout that helps among many, and the chance that the best of so many is only luck.

Half of the sequences rank the layouts. Only the best of them is then tested on the other half, so
that this test needs no correction for the number of layouts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mergekit_interleave._statistics import LEVEL, chunks, needed
from mergekit_interleave.errors import DirectiveError

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

LEAST = 10
"""The fewest sequences: 4 in a half have 16 flips, so that no chance would be below 5 %."""

FLIPS = 1000
RESAMPLES = 4000
ROUNDING = 1e-9  # relative, far above that of sums of float64


@dataclass(frozen=True)
class Split:
    """The two halves of the sequences.

    Args:
        selection: Sorted indices of the sequences that rank the layouts.
        held_out: Sorted indices of the other sequences, at most one more.
    """

    selection: Indices
    held_out: Indices


@dataclass(frozen=True)
class Finding:
    """One of the best layouts; all differences are in nats per sequence.

    Args:
        layout: The row of the differences.
        selected: The mean difference on the selection part, which is too high for the best of many.
        held_out: The mean difference on the held-out part.
        interval: The 95 % bootstrap interval of `held_out`, of this layout alone.
        needed: The number of sequences that show a difference of the size of `held_out`, by the
            function `needed`; None if the difference is 0.
    """

    layout: int
    selected: float
    held_out: float
    interval: tuple[float, float]
    needed: int | None


@dataclass(frozen=True)
class Analysis:
    """What the differences of many layouts say.

    Args:
        split: The two halves of the sequences.
        tried: The number of layouts.
        findings: The best layouts on the selection part, best first.
        chance: The chance that one of so many layouts looks as good as the first finding on the
            selection part, if none helps.
        best: The first finding if it helps, else None.
    """

    split: Split
    tried: int
    findings: tuple[Finding, ...]
    chance: float
    best: Finding | None


def split(count: int, seed: int) -> Split:
    """Split sequences at random into two halves.

    Raises:
        DirectiveError: There are fewer than `LEAST` sequences.
    """
    if count < LEAST:
        raise DirectiveError(
            f"too few sequences to tell whether a layout helps: {count}",
            hint=f"measure at least {LEAST}: a longer text, a larger --tokens, or more items",
        )
    order = np.random.default_rng((seed, 0)).permutation(count)
    return Split(np.sort(order[: count // 2]), np.sort(order[count // 2 :]))


def analyse(differences: npt.NDArray[np.floating[Any]], *, seed: int, top: int = 5) -> Analysis:
    """Rank layouts on the selection part, and test the best one on the held-out part.

    The sequences are taken as independent. A layout with a difference that is not finite is broken,
    and is never among the findings. Only the first finding can be `best`: it helps if its `chance`
    is below 5 % and its interval lies above 0. The others would need a correction for their number.

    Args:
        differences: Score minus base score in nats, of shape (layouts, sequences).
        seed: Seed of the split, the sign flips and the bootstrap.
        top: The largest number of findings.

    Raises:
        DirectiveError: There are fewer than `LEAST` sequences.
    """
    parts = split(differences.shape[1], seed)
    ranked = _ranked(differences, parts)
    selection = np.asarray(differences[np.ix_(ranked, parts.selection)], dtype=np.float64)
    held_out = np.asarray(differences[np.ix_(ranked[:top], parts.held_out)], dtype=np.float64)
    findings = tuple(
        Finding(int(row), float(chosen.mean()), float(values.mean()), interval, _needed(values))
        for row, chosen, values, interval in zip(
            ranked[:top], selection[:top], held_out, _intervals(held_out, seed), strict=True
        )
    )
    chance = _chance(selection, seed) if findings else 1.0
    helps = chance < LEVEL and findings[0].interval[0] > 0
    return Analysis(parts, len(differences), findings, chance, findings[0] if helps else None)


def ranking(differences: npt.NDArray[np.floating[Any]], *, seed: int) -> list[int]:
    """Return the rows of the layouts that are not broken, best on the selection part first.

    Args:
        differences: Score minus base score in nats, of shape (layouts, sequences).
        seed: Seed of the split.

    Raises:
        DirectiveError: There are fewer than `LEAST` sequences.
    """
    found: list[int] = _ranked(differences, split(differences.shape[1], seed)).tolist()
    return found


def _ranked(differences: npt.NDArray[np.floating[Any]], parts: Split) -> Indices:
    usable = np.flatnonzero(np.isfinite(differences).all(axis=1))
    means = differences[np.ix_(usable, parts.selection)].mean(axis=1, dtype=np.float64)
    return usable[np.argsort(-means, kind="stable")]


def _needed(values: Floats) -> int | None:
    difference = float(values.mean())
    return needed(float(values.std(ddof=1)), difference) if difference else None


def _chance(differences: Floats, seed: int) -> float:
    """Return the chance that the best of all layouts reaches the first's statistic, by sign flips.

    A flip changes the signs of whole sequences, in all layouts at once, which keeps the correlation
    of the layouts. This is exact if the differences are symmetric about 0 where nothing helps.
    """
    largest = np.abs(differences).max(axis=1, keepdims=True)
    scaled = differences / np.where(largest > 0, largest, 1)
    norms = np.sqrt(np.square(scaled).sum(axis=1, keepdims=True))
    units = np.ascontiguousarray((scaled / np.maximum(norms, 1)).T)
    cubes = units**3
    count = len(units)
    observed = _statistics(np.ones((1, count)), units[:, :1], cubes[:, :1]).item()
    observed -= ROUNDING * abs(observed)
    generator = np.random.default_rng((seed, 1))
    reached = 0
    for rows in chunks(FLIPS, max(differences.shape)):
        signs = np.where(generator.random((rows, count)) < 1 / 2, -1.0, 1.0)
        best = _statistics(signs, units, cubes).max(axis=1)
        reached += int((best >= observed).sum())
    return (1 + reached) / (1 + FLIPS)


def _statistics(signs: Floats, units: Floats, cubes: Floats) -> Floats:
    """Return the studentized means of flipped differences, corrected for their skewness.

    They are studentized by the deviation from 0, which flips do not change; the usual studentized
    mean is a monotone function of this one. Where a few sequences lose much and most gain a little,
    it is often large by chance. The transformation of Hall (On the removal of skewness by
    transformation, Journal of the Royal Statistical Society B 54, 1992) corrects it for that.

    Args:
        signs: The signs of each flip, of shape (flips, sequences).
        units: Differences whose squares sum to 1, or zeros, of shape (sequences, layouts).
        cubes: `units` to the power of 3.
    """
    means = signs @ units
    skewness = signs @ cubes
    statistics: Floats = means + skewness * (1 / 6 + means**2 / 3 + skewness * means**3 / 27)
    return statistics


def _intervals(samples: Floats, seed: int) -> list[tuple[float, float]]:
    """Return the 95 % bootstrap-t interval of the mean of each row.

    Where the differences are skewed, it errs less than percentile and BCa intervals. The deviation
    of a resample counts as at least 1/count of that of the sample, so that the interval is finite
    where all values of a resample are equal.
    """
    count = samples.shape[1]
    means, deviations = samples.mean(axis=1), samples.std(axis=1, ddof=1)
    units = (samples - means[:, None]) / np.where(deviations > 0, deviations, 1)[:, None]
    generator = np.random.default_rng((seed, 2))
    studentized = []
    for resamples in chunks(RESAMPLES, count):
        drawn = generator.integers(0, count, size=(resamples, count))
        drawn += count * np.arange(resamples)[:, None]
        times = np.bincount(drawn.ravel(), minlength=resamples * count).reshape(drawn.shape)
        resampled = times @ units.T / count
        variances = (times @ np.square(units).T - count * resampled**2) / (count - 1)
        studentized.append(resampled / np.sqrt(np.maximum(variances, count**-2.0)))
    high, low = np.quantile(np.concatenate(studentized), [1 - LEVEL / 2, LEVEL / 2], axis=0)
    return [
        *zip((means - high * deviations).tolist(), (means - low * deviations).tolist(), strict=True)
    ]
