"""Provide the facts about each model type: data, and typed access to it.

To add a model type, add an entry to `data/architectures.json`; `data/README.md` explains its keys,
and `make zoo TYPE=name` checks it.
"""
