"""Define limits that prevent a typo from filling memory or disk."""

from __future__ import annotations

MAX_LAYERS = 10_000
"""The maximum number of layers in a layout."""
