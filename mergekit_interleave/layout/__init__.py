"""Expand a directive to the ordered layers of the new model, and convert them to mergekit YAML.

To support a new format, add a module here that reads or returns `Layout`. Pure.
"""
