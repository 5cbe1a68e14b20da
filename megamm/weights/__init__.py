"""Weights: what a tensor is called, how it is packed and how it is cut. Knows tables, not models.

`keymap` holds the table, `pack` and `shard` the exact inverse pairs that its columns name, `hf` and `torch_dist` stream
the two formats, `directory` says what lies beside the weights, `convert` goes from one format to the other. `draw`
makes what no release has, `positions` are fitted to pictures of another size. No module of a model is imported here.
"""
