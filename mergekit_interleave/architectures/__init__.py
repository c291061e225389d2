"""What is known of each model type: data, and typed access to it.

A new model type is an entry in `data/architectures.json`; `make zoo TYPE=name` checks it.
"""
