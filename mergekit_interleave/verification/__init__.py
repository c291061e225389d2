"""Compare a model with what it must be.

A new check is a module here that returns `Difference` values.
"""
