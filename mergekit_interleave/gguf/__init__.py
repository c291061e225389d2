"""Read the headers of GGUF files: the metadata and the descriptions of the tensors.

To add what llama.cpp does with an architecture, add an entry to `architectures/data/gguf.json`. The
stream engine writes the files; see `engines/gguf_splits.py`.
"""
