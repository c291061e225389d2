"""Measures many layouts of one model on text and items, and says which of them help.

To add a space of layouts, add it to `SPACES` in `spaces.py`, and its name to the help of `--space`.
"""
