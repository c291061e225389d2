"""Measures many layouts of one model on text and items, and says which of them help.

To add a space of layouts, add a function to `SPACES` in `spaces.py`.
"""
