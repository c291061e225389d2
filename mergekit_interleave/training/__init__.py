"""Train exactly the new layers, by a trainer's own settings or by freezing the rest.

A new trainer is a file in `trainers/` and a row in its registry.
"""
