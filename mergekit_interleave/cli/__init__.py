"""One file per command: options in, one call of the Python API, text out.

A new command is a file here, a function in `commands/`, and a line in each of two lists: `COMMANDS`
in `app.py` and `_MODULES` in the package root.
"""
