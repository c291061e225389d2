"""Plan every tensor, config and file of the result from a layout and its checkpoints.

Properties of the result are computed only here; other packages read them from `ExpansionPlan`.
"""
