"""Define the command line: the module of a command parses its options and prints its result.

To add a command, add a module here, a function in `commands/`, and a line to each of two lists:
`COMMANDS` in `app.py` and `_MODULES` in the package root.
"""
