"""Random weights by name: what is drawn depends on a seed and the tensor's canonical name, on no layout and no order.

Shared by a start that is written without a model and by a model that is built without weights.
"""

import hashlib
import re

import torch
from torch import Tensor


def draw(name: str, shape: tuple[int, ...], seed: int, std: float = 0.02) -> Tensor:
    """The whole tensor of a canonical name, float32: norms 1, biases 0, the rest normal(0, std)."""
    if name.endswith("bias"):
        return torch.zeros(shape)
    if re.search(r"norm(\.\d+)?[._]weight$", name):
        return torch.ones(shape)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(shape, generator=generator).mul_(std)
