"""Define the command line.

The module of a command reads the options, calls the Python API and prints the result.

To add a command, add a module here, a function in `commands/`, and a line to each of two lists:
`COMMANDS` in `app.py` and `_MODULES` in the package root.
"""
