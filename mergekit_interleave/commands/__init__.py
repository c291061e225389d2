"""What a command does, as a function that anyone can call.

A new command is a module here with a function of the same name, and a line in the package root.
"""
