"""The best of many layouts: its chance if nothing helps, and its gain on sequences of its own."""

from __future__ import annotations

import numpy as np
import pytest

from mergekit_interleave import _statistics
from mergekit_interleave._statistics import needed
from mergekit_interleave.errors import DirectiveError
from mergekit_interleave.scanning import analysis
from mergekit_interleave.scanning.analysis import analyse, split


def noise(kind: str, layouts: int, sequences: int, seed: int) -> analysis.Floats:
    """Return differences with mean 0: neighbours are correlated, and sequences vary as a whole."""
    generator = np.random.default_rng((17, seed))
    values = generator.standard_normal((layouts, sequences))
    for row in range(1, layouts):
        values[row] = 0.9 * values[row - 1] + np.sqrt(0.19) * values[row]
    values = np.sqrt(0.5) * (values + generator.standard_normal(sequences))
    match kind:
        case "student":  # 2 degrees of freedom: the variance is infinite
            return values / np.sqrt(generator.chisquare(2, sequences) / 2)
        case "gains":
            return np.exp(values) - np.exp(0.5)
        case "losses":
            return np.exp(0.5) - np.exp(values)
    return values


@pytest.mark.parametrize("kind", ["gauss", "student", "gains", "losses"])
def test_nothing_helps(kind: str) -> None:
    """Where nothing helps, the chance is as often small as it says, and the verdict is right."""
    seeds = 30
    found = [analyse(noise(kind, 40, 200, seed), seed=seed) for seed in range(seeds)]
    assert sum(one.best is not None for one in found) <= 0.07 * seeds
    assert sum(one.chance < 0.05 for one in found) <= 0.15 * seeds


@pytest.mark.parametrize("kind", ["gauss", "student", "gains"])
def test_planted_gain(kind: str) -> None:
    """A layout that gains in the mean is found among many, with its sign and its size."""
    differences = noise(kind, 100, 400, 1)
    differences[37] += 1.5
    found = analyse(differences, seed=3)
    assert found.tried == 100
    assert found.best is not None
    assert found.best == found.findings[0]
    assert found.best.layout == 37
    assert found.best.interval[0] > 0
    assert found.best.interval[0] < 1.5 < found.best.interval[1]
    held_out = differences[37, found.split.held_out]
    assert found.best.held_out == pytest.approx(held_out.mean())
    assert found.best.selected == pytest.approx(differences[37, found.split.selection].mean())
    assert found.best.needed == needed(held_out.std(ddof=1), held_out.mean())
    assert analyse(-np.abs(differences), seed=3).best is None


@pytest.mark.parametrize("kind", ["gauss", "student", "gains", "losses"])
def test_gain_of_every_sequence(kind: str) -> None:
    """A layout with which all of few sequences gain helps, whatever the shape of its gains is."""
    differences = noise("gauss", 100, 40, 11) - 1
    gains = noise(kind, 1, 40, 12)[0]
    differences[62] = gains - gains.min() + 0.5
    found = analyse(differences, seed=0)
    assert found.best is not None
    assert found.best.layout == 62


def test_rank() -> None:
    """The findings are the best layouts on the selection part, best first; others do not matter."""
    differences = noise("gauss", 50, 100, 2)
    means = differences[:, split(100, 0).selection].mean(axis=1)
    found = analyse(differences, seed=0, top=7)
    assert [one.layout for one in found.findings] == [*np.argsort(-means)[:7]]
    assert found.findings[:3] == analyse(differences, seed=0, top=3).findings
    assert len(analyse(differences[:2], seed=0).findings) == 2


def test_only_luck_on_the_selection_part() -> None:
    """A gain that is absent from the held-out part does not help, however small its chance is."""
    differences = noise("gauss", 50, 100, 4)
    differences[8, split(100, 0).selection] += 2
    found = analyse(differences, seed=0)
    assert found.findings[0].layout == 8
    assert found.chance < 0.01
    assert found.best is None


def test_only_the_first_finding_is_tested() -> None:
    """A second finding with a clear gain is not chosen after the first one failed."""
    differences = noise("gauss", 50, 100, 4)
    differences[8] += 2
    differences[9, split(100, 0).selection] += 4
    found = analyse(differences, seed=0)
    assert [one.layout for one in found.findings[:2]] == [9, 8]
    assert found.findings[1].interval[0] > 0
    assert found.best is None


def test_identities() -> None:
    """Layouts that change nothing do not help, and their intervals are 0."""
    found = analyse(np.zeros((20, 30)), seed=0)
    assert found.best is None
    assert found.chance == 1
    assert [one.layout for one in found.findings] == [0, 1, 2, 3, 4]
    for one in found.findings:
        assert (one.selected, one.held_out, one.interval) == (0, 0, (0, 0))
        assert one.needed is None


def test_identity_among_losses() -> None:
    """An identity is the best of layouts that all lose, and does not help."""
    differences = noise("gauss", 20, 30, 5) - 10
    differences[6] = 0
    found = analyse(differences, seed=0)
    assert found.findings[0].layout == 6
    assert found.chance == 1
    assert found.best is None


def test_determinism() -> None:
    """The seed determines every number, and another seed gives another split."""
    differences = noise("student", 30, 60, 6)
    one, same, other = (analyse(differences, seed=seed) for seed in (1, 1, 2))
    assert (one.findings, one.chance) == (same.findings, same.chance)
    assert (one.split.selection == same.split.selection).all()
    assert (one.split.selection != other.split.selection).any()
    assert one.findings != other.findings


def test_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """How much is held in memory at once does not change a number."""
    differences = noise("gauss", 30, 60, 6)
    whole = analyse(differences, seed=1)
    monkeypatch.setattr(_statistics, "CHUNK", 700)
    parts = analyse(differences, seed=1)
    assert whole.chance == parts.chance
    for one, two in zip(whole.findings, parts.findings, strict=True):
        assert one.interval == pytest.approx(two.interval)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_broken_layouts(value: float) -> None:
    """A layout with a difference that is not finite is no finding, and changes no other one."""
    differences = noise("gauss", 30, 60, 7)
    differences[[3, 4]] += 2
    whole = np.delete(differences, 4, axis=0)
    differences[4, 50] = value
    found, without = analyse(differences, seed=0), analyse(whole, seed=0)
    assert found.best is not None
    assert found.best.layout == 3
    assert found.tried == 30
    assert found.chance == without.chance
    assert [one.interval for one in found.findings] == [one.interval for one in without.findings]


@pytest.mark.parametrize("layouts", [0, 3])
def test_no_layout_can_be_ranked(layouts: int) -> None:
    """Without a layout that is whole, nothing helps."""
    found = analyse(np.full((layouts, 20), np.nan), seed=0)
    assert (found.tried, found.findings, found.chance, found.best) == (layouts, (), 1, None)


@pytest.mark.parametrize("count", [10, 11, 1000])
def test_split(count: int) -> None:
    """Each sequence is in exactly one part, and the parts are halves."""
    parts = split(count, 3)
    assert sorted([*parts.selection, *parts.held_out]) == [*range(count)]
    assert 0 <= len(parts.held_out) - len(parts.selection) <= 1
    assert [*parts.selection] == sorted(parts.selection)
    assert [*parts.held_out] == sorted(parts.held_out)


@pytest.mark.parametrize("count", [0, 1, 9])
def test_too_few_sequences(count: int) -> None:
    """Too few sequences for a verdict are an error that says how many are needed."""
    with pytest.raises(DirectiveError) as caught:
        analyse(np.zeros((5, count)), seed=0)
    assert str(count) in str(caught.value)
    assert "10" in str(caught.value.hint)


def test_chance_of_equal_gains() -> None:
    """Of equal gains in 5 sequences, 1 flip in 32 gives so large a sum; scale does not matter."""
    for gain in (1e-200, 1e-5, 1.0, 1e200):
        found = analyse(np.full((3, 10), gain), seed=0)
        assert found.chance == pytest.approx(1 / 32, abs=0.015)
        assert found.findings[0].interval == pytest.approx((gain, gain))


def test_chance_is_corrected() -> None:
    """The chance of the same differences is larger among more layouts, except among copies."""
    differences = noise("gauss", 1, 100, 8) + 0.45
    others = np.random.default_rng(0).standard_normal((300, 100)) - 1
    alone = analyse(differences, seed=0).chance
    assert alone < 0.02
    assert analyse(np.vstack([differences] * 300), seed=0).chance == alone
    assert analyse(np.vstack([differences, others]), seed=0).chance > 5 * alone


@pytest.mark.parametrize(("kind", "least"), [("gauss", 0.93), ("student", 0.9), ("losses", 0.87)])
def test_intervals(kind: str, least: float) -> None:
    """The interval of the mean covers it about as often as it says."""
    layouts, sequences = 400, 100
    generator = np.random.default_rng(9)
    values = {
        "gauss": generator.standard_normal,
        "student": lambda size: generator.standard_t(2, size),
        "losses": lambda size: np.exp(0.5) - np.exp(generator.standard_normal(size)),
    }[kind]((layouts, sequences))
    found = analyse(values, seed=0, top=layouts)
    covered = [one.interval[0] <= 0 <= one.interval[1] for one in found.findings]
    assert least <= np.mean(covered) <= 0.98


@pytest.mark.parametrize(
    ("deviation", "difference", "count"),
    [(1, 0.1, 785), (1, -0.1, 785), (2, 0.1, 3140), (0.5, 0.5, 8), (0, 0.1, 1)],
)
def test_needed(deviation: float, difference: float, count: int) -> None:
    """The number of sequences is (1.95996 + 0.84162)**2 * variance / difference**2, rounded up."""
    assert needed(deviation, difference) == count
