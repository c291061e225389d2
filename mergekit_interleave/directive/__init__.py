"""Parse the user's text into a `Directive`, and write it back.

To add a growth line, add a file to `growth/` and a row to `growth/registry.py`. Pure.
"""
