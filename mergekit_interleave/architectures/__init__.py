"""What is known of each model type: data, and typed access to it.

A new model type is one entry in `data/architectures.json`, whose keys `data/README.md` explains;
`make zoo TYPE=name` checks it.
"""
