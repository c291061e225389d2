"""Parse the user's text into a `Directive`, and write it back; pure.

A new growth line is a file in `growth/` and a row in `growth/registry.py`.
"""
