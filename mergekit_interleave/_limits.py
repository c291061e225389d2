"""Limits that keep a slip from filling memory or disk."""

from __future__ import annotations

MAX_LAYERS = 10_000
"""No layout has more layers: a slip of the pen must not fill the memory."""
