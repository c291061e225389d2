"""From a layout and its checkpoints to every tensor, config and file of the result.

A new property of the result is computed here once, and read from `ExpansionPlan` everywhere else.
"""
