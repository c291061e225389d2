"""The user's text and the `Directive` that it means; pure.

A new growth line is a file in `growth/` and a row in its registry.
"""
