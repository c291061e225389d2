"""Read a model directory or a Hub repository.

To support a new storage format for weights, add a module here that yields `Tensor` values.
"""
