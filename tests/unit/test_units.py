"""Sizes in bytes, parsed and formatted."""

from __future__ import annotations

import pytest

from mergekit_interleave._units import amount, parse_amount


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5B", 5 * 10**9),
        ("5GB", 5 * 10**9),
        ("5gb", 5 * 10**9),
        ("4.5G", 4_500_000_000),
        ("2GiB", 2 * 2**30),
        ("500MB", 5 * 10**8),
        ("500k", 500_000),
        ("1000", 1000),
        ("five", None),
        ("-5", None),
        ("5 B B", None),
        ("", None),
    ],
)
def test_sizes_are_parsed(text: str, size: int | None) -> None:
    """Sizes with common units are parsed, and any other text gives None."""
    assert parse_amount(text) == size


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1 kB"),
        (1_234_567, "1.23 MB"),
        (999_600_000, "1 GB"),
        (700 * 10**9, "700 GB"),
        (10**18, "1e+03 PB"),
    ],
)
def test_sizes_are_formatted(nbytes: int, text: str) -> None:
    """A size is formatted with three digits and a unit."""
    assert amount(nbytes) == text
