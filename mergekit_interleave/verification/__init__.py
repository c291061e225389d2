"""Compare a model with its recorded layout and its sources.

A new check is a module here that returns `Difference` values.
"""
