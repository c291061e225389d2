"""Write the weights; every engine follows one protocol.

A new engine is a file here and a row in the registry.
"""
