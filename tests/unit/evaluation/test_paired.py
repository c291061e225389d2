"""The difference of two models: its interval, and a chance that is right at any number of items."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, ttest_rel

from mergekit_interleave import _statistics
from mergekit_interleave.evaluation import paired
from mergekit_interleave.evaluation.paired import Floats, Pairs, difference, holm

SEEDS = 200

values = st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=30)
chances = st.lists(st.floats(0, 1), min_size=1, max_size=12)


def pairs(base: Floats, grown: Floats, groups: object = None, weights: object = None) -> Pairs:
    """Return values of items that are alike and independent, unless stated otherwise."""
    count = len(base)
    return Pairs(
        np.asarray(base, dtype=float),
        np.asarray(grown, dtype=float),
        np.ones(count) if weights is None else np.asarray(weights, dtype=float),
        np.arange(count) if groups is None else np.asarray(groups),
    )


@given(values)
def test_swapping_the_models(found: list[tuple[int, int]]) -> None:
    """The other direction has the other sign, and the same chance; nothing lies outside 0 to 1."""
    base, grown = np.array(found, dtype=float).T
    one, other = difference(pairs(base, grown)), difference(pairs(grown, base))
    assert one.mean == pytest.approx(-other.mean)
    assert one.interval == pytest.approx((-other.interval[1], -other.interval[0]))
    assert one.chance == pytest.approx(other.chance)
    assert 0 < one.chance <= 1
    assert one.mean == pytest.approx(grown.mean() - base.mean())
    assert one.interval[0] - 1e-9 <= one.mean <= one.interval[1] + 1e-9


@given(values, st.integers(0, 4))
def test_equal_values(found: list[tuple[int, int]], shift: int) -> None:
    """Equal values have the difference 0 exactly; a shift of both models changes nothing."""
    base, grown = np.array(found, dtype=float).T
    same = difference(pairs(base, base))
    assert (same.mean, same.interval, same.chance, same.deviation) == (0, (0, 0), 1, 0)
    one, moved = difference(pairs(base, grown)), difference(pairs(base + shift, grown + shift))
    if not pairs(base, grown).are_right_or_wrong:
        assert one.chance == moved.chance


@pytest.mark.parametrize(("gained", "lost"), [(0, 1), (3, 0), (9, 2), (40, 25)])
def test_right_and_wrong_answers(gained: int, lost: int) -> None:
    """The chance is that of McNemar's exact test, and the interval that of Bonett and Price."""
    base = np.zeros(200)
    base[:lost] = 1
    grown = np.zeros(200)
    grown[lost : lost + gained] = 1
    found = difference(pairs(base, grown))
    assert found.chance == pytest.approx(binomtest(gained, gained + lost).pvalue)
    up, down = (gained + 1) / 202, (lost + 1) / 202
    half = 1.959964 * np.sqrt((up + down - (up - down) ** 2) / 202)
    assert found.interval == pytest.approx((up - down - half, up - down + half), abs=1e-6)


def test_numbers() -> None:
    """The interval of independent numbers is Student's, and the chance is close to his."""
    generator = np.random.default_rng(4)
    base, grown = generator.normal(size=(2, 80))
    found, student = difference(pairs(base, grown)), ttest_rel(grown, base)
    assert found.interval == pytest.approx(tuple(student.confidence_interval()))
    assert found.chance == pytest.approx(student.pvalue, abs=0.02)


def test_all_flips_are_tried() -> None:
    """With few items, the chance is the share of all flips that reach the difference."""
    grown = np.array([1, 2, 4, 8, -1.5])
    found = difference(pairs(np.zeros(5), grown))
    sums = [grown @ signs for signs in np.array(np.meshgrid(*[[1, -1]] * 5)).reshape(5, -1).T]
    assert found.chance == np.mean(np.abs(sums) >= grown.sum())


def test_groups() -> None:
    """Copies of the items in groups change neither interval nor chance; as items, they would."""
    generator = np.random.default_rng(1)
    base, grown = generator.normal(size=(2, 40))
    once = difference(pairs(base, grown))
    copies = [np.repeat(each, 5) for each in (base, grown, np.arange(40))]
    grouped = difference(pairs(copies[0], copies[1], groups=copies[2]))
    assert grouped.interval == pytest.approx(once.interval)
    assert grouped.chance == once.chance
    narrow = difference(pairs(copies[0], copies[1])).interval
    assert narrow[1] - narrow[0] < 0.5 * (once.interval[1] - once.interval[0])


def test_groups_that_cancel() -> None:
    """Differences that cancel out in each group are no sign of a difference."""
    found = difference(pairs(np.zeros(8), np.tile([1, -1], 4), groups=np.repeat(range(4), 2)))
    assert (found.mean, found.chance) == (0, 1)


def test_weights() -> None:
    """An item of weight 2 counts in the mean like two items."""
    base, grown = np.array([0.0, 1, 2, 5]), np.array([1.0, 1, 4, 4])
    weighted = difference(pairs(base, grown, weights=[2, 1, 1, 1]))
    twice = difference(pairs([0, *base], [1, *grown], groups=[0, 0, 1, 2, 3]))
    assert weighted.mean == pytest.approx(twice.mean)
    assert weighted.interval == pytest.approx(twice.interval)
    assert weighted.chance == twice.chance


@pytest.mark.parametrize(
    ("kind", "seeds"),
    [("answers", SEEDS), ("rare", 1000), ("numbers", 1000), ("skewed", 1000), ("grouped", 1000),
     ("few", 1000)],
)  # fmt: skip
def test_nothing_is_found_where_nothing_is(
    kind: str, seeds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of models that differ by chance alone, at most 7 % are called different at the 5 % level.

    If exactly 5 % are, 1000 of them exceed that with a chance of 1 in 500; 200, with 1 in 13.
    """
    monkeypatch.setattr(paired, "FLIPS", 1000)
    found = [difference(_null(kind, seed), seed=seed).chance for seed in range(seeds)]
    assert np.mean(np.array(found) < _statistics.LEVEL) <= 0.07


def _null(kind: str, seed: int) -> Pairs:
    """Return the values of two models whose answers come from the same distribution."""
    generator = np.random.default_rng((3, seed))
    match kind:
        case "answers":
            return pairs(*(generator.random((2, 100)) < 0.4).astype(float))
        case "rare":  # about five items differ, so that the usual interval would be too narrow
            return pairs(*(generator.random((2, 120)) < 0.02).astype(float))
        case "numbers":
            return pairs(*generator.normal(size=(2, 60)))
        case "skewed":
            return pairs(*generator.exponential(size=(2, 40)) ** 3)
        case "grouped":  # what items of a group have in common makes most of their difference
            common = np.repeat(generator.normal(size=(2, 15)), 8, axis=1)
            items = generator.normal(size=(2, 120))
            return pairs(*(3 * common + items), groups=np.repeat(range(15), 8))
    return pairs(*generator.normal(size=(2, 6)))


def test_intervals_cover() -> None:
    """Intervals of right and wrong answers hold the true difference in 93 % of samples or more."""
    held = []
    for seed in range(SEEDS):
        generator = np.random.default_rng((5, seed))
        base = generator.random(80) < 0.3
        grown = np.where(generator.random(80) < 0.9, base, generator.random(80) < 0.8)
        low, high = difference(pairs(base, grown)).interval
        held.append(low <= 0.1 * (0.8 - 0.3) <= high)
    assert np.mean(held) >= 0.93


def test_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same seed gives the same chance, however much is held in memory at once."""
    generator = np.random.default_rng(0)
    one = pairs(*generator.normal(size=(2, 50)))
    found = difference(one, seed=7)
    assert difference(one, seed=7) == found
    assert difference(one, seed=8).chance != found.chance
    monkeypatch.setattr(_statistics, "CHUNK", 999)
    assert difference(one, seed=7).chance == found.chance


@given(chances)
def test_holm(found: list[float]) -> None:
    """A correction raises chances to at most 1 and keeps their order; one alone needs none."""
    corrected = holm(found)
    assert all(one <= more <= 1 for one, more in zip(found, corrected, strict=True))
    assert min(corrected) == min(1, len(found) * min(found))
    order = np.argsort(found, kind="stable")
    assert (np.diff(np.array(corrected)[order]) >= 0).all()
    assert holm(found[:1]) == found[:1]


def test_holm_of_known_chances() -> None:
    """The correction is that of Holm's paper, and of R's `p.adjust`."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
