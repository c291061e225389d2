"""Write OUT atomically, with interleave.json, the model card and the picture.

A new file in OUT needs a module here and a row in `_out_files`.
"""
