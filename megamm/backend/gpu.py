"""The GPU backend: NCCL, bf16, Transformer Engine's layers, FP8 where the device has it."""

import torch

from megamm.backend import Backend, LayerModules
from megamm.errors import MegammError


def start(local_rank: int) -> Backend:
    """Take GPU number `local_rank` of this node and describe it.

    Raises MegammError when torch sees no GPU, or when Transformer Engine is missing: megatron-core would hand out
    mock layers in its place.
    """
    if not torch.cuda.is_available():
        raise MegammError(
            "train.backend is gpu, but torch sees no GPU here. Run `nvidia-smi` to see whether the driver does, "
            "install a CUDA build of torch, or take train.backend cpu."
        )
    try:
        from megatron.core.extensions.transformer_engine import (
            TEColumnParallelLinear,
            TEDotProductAttention,
            TELayerNormColumnParallelLinear,
            TENorm,
            TERowParallelLinear,
        )
        from transformer_engine.pytorch.fp8 import FP8GlobalStateManager
    except ImportError as error:
        raise MegammError(
            "The GPU backend needs Transformer Engine, which cannot be imported "
            f"({error}). Install it with `pip install 'megamm[gpu]' -c constraints.txt`, or take train.backend cpu."
        ) from error
    if local_rank >= torch.cuda.device_count():
        raise MegammError(
            f"Local rank {local_rank} has no GPU: this node shows {torch.cuda.device_count()}. "
            "Start at most that many processes per node (--nproc-per-node)."
        )
    torch.cuda.set_device(local_rank)
    has_fp8, _ = FP8GlobalStateManager.is_fp8_available()
    return Backend(
        name="gpu",
        device=torch.device("cuda", local_rank),
        collectives="nccl",
        layers=LayerModules(
            column_linear=TEColumnParallelLinear,
            norm_column_linear=TELayerNormColumnParallelLinear,
            row_linear=TERowParallelLinear,
            norm=TENorm,
            core_attention=TEDotProductAttention,
        ),
        precisions=("fp32", "bf16", "fp8") if has_fp8 else ("fp32", "bf16"),
        config_flags=dict(
            use_cpu_initialization=False,
            bias_dropout_fusion=True,
            bias_activation_fusion=True,
            masked_softmax_fusion=True,
            apply_rope_fusion=True,
            gradient_accumulation_fusion=False,
            batch_p2p_comm=False,
            deallocate_pipeline_outputs=True,
        ),
        overlap_gradient_reduction=True,
        pins_memory=True,
        memory_bytes=torch.cuda.max_memory_allocated,
        synchronize=torch.cuda.synchronize,
    )
