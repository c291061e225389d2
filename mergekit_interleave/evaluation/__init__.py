"""Compares a grown model with its base on tasks of lm-eval, item by item.

To add a form of metric, add how lm-eval aggregates it to `_form` in `metrics.py`.
"""
