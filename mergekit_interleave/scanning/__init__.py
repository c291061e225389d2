"""Measure many layouts of one model on text and items, and say which help."""
