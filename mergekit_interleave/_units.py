"""Format and parse numbers of bytes and of parameters."""

from __future__ import annotations

import re

_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4, "B": 3}
"""The exponent of 1000 or 1024 for each unit; B is mergekit's letter for a billion."""


def amount(nbytes: int) -> str:
    """Format a number of bytes with three digits and a unit, such as 1.23 GB."""
    value, units = float(nbytes), iter(("bytes", "kB", "MB", "GB", "TB", "PB"))
    unit = next(units)
    while value >= 999.5 and unit != "PB":  # noqa: PLR2004 - rounds to 1000
        value, unit = value / 1000, next(units)
    return f"{value:.3g} {unit}"


def count(number: int) -> str:
    """Format a number of parameters as in model names: 8.99B, 155.8M."""
    value, units = float(number), iter(("", "K", "M", "B", "T"))
    unit = next(units)
    while value >= 999.95 and unit != "T":  # noqa: PLR2004 - rounds to 1000.0
        value, unit = value / 1000, next(units)
    digits = 2 if unit in ("B", "T") else 1
    return f"{value:.{digits}f}{unit}" if unit else str(number)


def decimal(number: float) -> str:
    """Format a number with one decimal, or with none if that decimal is 0."""
    return f"{number:.1f}".removesuffix(".0")


def parse_amount(text: str) -> int | None:
    """Parse a number of bytes: 5000000000, 5B (mergekit's billion), 5GB, 4.5GB, 4GiB or 500M.

    Returns:
        The number of bytes, or None if the text is not one of these forms.
    """
    match = re.fullmatch(
        r"(\d{1,15}(?:\.\d{1,9})?)\s*(?:([KMGTB])|([KMGT])B|([KMGT])iB)?", text, re.IGNORECASE
    )
    if match is None:
        return None
    letter = (match[2] or match[3] or "").upper()
    factor = 1024 ** _UNITS[match[4].upper()] if match[4] else 1000 ** _UNITS[letter]
    return int(float(match[1]) * factor)
