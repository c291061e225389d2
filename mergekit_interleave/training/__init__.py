"""Train exactly the new layers, with a trainer's own settings or by freezing the rest.

A new trainer is one module in `trainers/` and one row in `trainers/registry.py`.
"""
