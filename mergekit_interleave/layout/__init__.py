"""The ordered layers of the new model, and their mergekit YAML; pure.

A new way to write a layout is a module here that reads or returns `Layout`.
"""
