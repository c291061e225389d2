"""Plan every tensor, config and file of the result from a layout and its checkpoints.

A new property of the result is computed here once; other packages read it from `ExpansionPlan`.
"""
