"""What tests, examples and benchmarks make on the spot: tiny checkpoints and datasets. Not used by training."""
