"""One module per trainer: its rule for parameter names, and the settings that follow from it.

A new trainer is a module with a function `full` or `lora`, and a row in `registry`.
"""
