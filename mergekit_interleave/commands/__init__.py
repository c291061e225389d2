"""One module per command: the function that performs it, which is also the Python API.

To add a command, add a module with a function of the same name, and a line in the package root.
"""
