"""Decoders: one file of options and key names per published architecture."""
