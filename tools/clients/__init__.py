"""Run grown models and their bases in programs that this project did not write, and compare.

`make clients` runs this package. To add a client, add a file that yields rows, and its row to
`registry.py`; a new environment is one file in `requirements/`.
"""
