"""Weights: what a tensor is called, how it is packed and how it is cut. Knows tables, not models.

`keymap` holds the table, `pack` and `shard` the exact inverse pairs that its columns name, `hf` streams Hugging Face
directories in and out, `convert` is the only user of all of them. No module of a model is imported here.
"""
