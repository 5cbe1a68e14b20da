"""megamm: training multimodal language models on megatron-core. Importing it imports nothing heavy."""

import warnings

# megatron-core warns, module by module and rank by rank, that Transformer Engine or apex is absent. On the CPU that is
# the plan, and on a GPU megamm/backend/gpu.py checks what it needs; torch renames functions that megatron-core calls.
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
warnings.filterwarnings("ignore", category=FutureWarning, module=r"megatron\.core\.dist_checkpointing")

__version__ = "0.1.0"
