"""Makes tasks for lm-eval that need no data set of the Hub.

To add a task, write it in `suite.py`, and add its name to `NAMES` and a row to docs/evaluate.md.
"""
