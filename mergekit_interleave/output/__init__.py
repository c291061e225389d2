"""The files at OUT: staging, interleave.json, the model card and the picture.

A new file of OUT is a module here and a row in `_out_files`.
"""
