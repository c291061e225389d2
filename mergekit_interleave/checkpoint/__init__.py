"""Read a model directory or a Hub repository.

A new way to store weights is a module here that yields `Tensor` values.
"""
