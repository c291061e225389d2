"""Read a model directory or a Hub repository.

To add a storage format for weights, write a module here that yields `Tensor` values.
"""
