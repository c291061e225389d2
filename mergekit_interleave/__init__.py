"""Grow language models deeper with mergekit: one line in, a verified model out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mergekit_interleave._version import __version__

if TYPE_CHECKING:
    from mergekit_interleave.training.freeze import freeze_original_layers


__all__ = ["__version__", "freeze_original_layers"]


def __getattr__(name: str) -> Any:
    """Import what is public when it is asked for: `gen` is to start at once."""
    if name == "freeze_original_layers":
        from mergekit_interleave.training.freeze import freeze_original_layers  # noqa: PLC0415

        return freeze_original_layers
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
