"""Expand a directive into the layers of the new model, and convert them to mergekit YAML.

To add a layout format, write a module here that reads or returns a `Layout`. Pure.
"""
