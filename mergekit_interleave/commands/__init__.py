"""Implement the commands as functions, which are also the Python API.

To add a command, add a module with a function of the same name, and a line to `_MODULES` in the
package root.
"""
