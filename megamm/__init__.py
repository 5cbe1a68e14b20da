"""megamm: training multimodal language models on megatron-core. Importing it imports nothing heavy."""

__version__ = "0.1.0"
