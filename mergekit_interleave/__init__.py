"""Grow language models deeper with mergekit: one line in, a verified model out."""

__version__ = "0.1.0"

__all__ = ["__version__"]
