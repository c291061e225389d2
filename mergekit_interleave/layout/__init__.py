"""Expand a directive to the ordered layers of the new model, and convert them to mergekit YAML.

A new format of layouts is a module here that reads or returns `Layout`. Pure.
"""
