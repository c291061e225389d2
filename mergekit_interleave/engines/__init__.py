"""Write the weights; every engine is one module that follows `protocol.Engine`.

To add an engine, write its module and add a row to `registry.ENGINES`.
"""
