"""Recomputation and frozen inputs."""

from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor


def keep_gradient_path(x: Tensor, block: TransformerBlock) -> Tensor:
    """The input of `block`, such that recomputation does not lose the gradients of its weights.

    A recomputed function whose tensor inputs need no gradient (a frozen embedding under trained layers) is run without
    recording, and its weights silently get no gradient. So an input that needs none is made a leaf that does.
    """
    is_recomputed = block.config.recompute_granularity == "full" and block.training
    if not is_recomputed or x.requires_grad or not any(p.requires_grad for p in block.parameters()):
        return x
    return x.detach().requires_grad_()
