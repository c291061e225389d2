"""Builds a deeper model in memory, whose layers share the tensors of loaded models.

To add an operation on tensors, extend `values.py`; see `planning/tensor_plan.py`.
"""
