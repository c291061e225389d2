"""Measures many layouts of one model on text and items, and says which of them help."""
