"""Plan every tensor, config and file of the result from a layout and its checkpoints.

To add a property of the result, compute it here; other packages read it from `ExpansionPlan`.
"""
