"""Expand a directive to the ordered layers of the new model, and convert them to mergekit YAML.

To add a format of layouts, write a module here that reads or returns `Layout`. Pure.
"""
