"""DDP, the distributed optimizer, its parameter groups and its schedule."""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    ParamKey,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megamm import backend
from megamm.config.schema import PARTS, Optim
from megamm.models.vlm import VLM


def wrap(stages: Sequence[VLM], *, distributed_optimizer: bool = True) -> list[DistributedDataParallel]:
    """Put each virtual stage behind DDP, and tell megatron-core's schedule how its gradients are reduced.

    Gradients are summed in float32. Without the distributed optimizer every rank ends with whole gradients in
    `main_grad`, which is what a comparison needs.
    """
    current = backend.current()
    overlap = current.overlap_gradient_reduction
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=distributed_optimizer,
        overlap_grad_reduce=overlap,
        bucket_size=current.gradient_bucket_size,
        average_in_collective=False,
    )
    config = stages[0].config
    wrapped = [
        DistributedDataParallel(config, ddp_config, stage, disable_bucketing=k > 0) for k, stage in enumerate(stages)
    ]
    for stage in wrapped:
        _store_bucket_padding(stage)
    config.finalize_model_grads_func = reduce_gradients
    if overlap:
        interleaved = len(wrapped) > 1
        no_syncs, starts = [s.no_sync for s in wrapped], [s.start_grad_sync for s in wrapped]
        config.no_sync_func = no_syncs if interleaved else no_syncs[0]
        config.grad_sync_func = starts if interleaved else starts[0]
    return wrapped


def reduce_gradients(stages: list[Any], num_tokens: torch.Tensor | None = None, **kwargs: Any) -> None:
    """megatron-core's reductions, then the sum over the copies of tied weights, wherever they live.

    Its own reduction takes virtual stage 0 on every rank but the last, so it is never used (`VLM` does not declare that
    it shares weights). The copies may even lie in two virtual stages of one rank.
    """
    finalize_model_grads(stages, num_tokens, **kwargs)
    grads: dict[str, list[torch.Tensor]] = defaultdict(list)
    for stage in stages:
        for name, copy in stage.module.tied_copies.items():
            if copy.requires_grad:
                grads[name].append(copy.main_grad)
    for name in sorted(grads):
        total = torch.stack(grads[name]).sum(0)
        group = parallel_state.get_embedding_group()
        if group.size() > 1:
            torch.distributed.all_reduce(total, group=group)
        for grad in grads[name]:
            grad.copy_(total)


def _store_bucket_padding(stage: DistributedDataParallel) -> None:
    """Count the padding between buckets as part of them.

    A fully reshardable checkpoint gathers buckets without their padding but addresses them with it, so optimizer state
    after the first bucket would be loaded from the wrong place.
    """
    for buffer in stage.buffers:
        for bucket in buffer.buckets:
            bucket.numel_unpadded = bucket.grad_data.numel()
        buffer.numel_unpadded = buffer.grad_data.numel()


def build_optimizer(optim: Optim, stages: Sequence[DistributedDataParallel]) -> MegatronOptimizer:
    """AdamW over the trainable parameters of this rank; state is split over data parallel ranks.

    Biases and norms (one-dimensional parameters) are never decayed. Every part of the model is a group of its own.
    """
    dtype = stages[0].config.params_dtype
    config = OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        min_lr=optim.min_lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_eps=optim.eps,
        clip_grad=optim.clip_norm,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=True,
    )
    overrides = get_standard_config_overrides(config)
    for k, part in enumerate(PARTS):
        lr = getattr(optim, f"{part}_lr")
        lr = optim.lr if lr is None else lr
        # megatron-core finds a stored group again by its multipliers, not by its learning rate: without a number of
        # its own here, a part would get another part's settings. Nothing multiplies with lr_mult any more.
        overrides[ParamKey(name=(f"{part}.*", f"module.{part}.*"))] = {
            "max_lr": lr,
            "min_lr": min(optim.min_lr, lr),
            "lr_mult": k + 1.0,
        }
    return get_megatron_optimizer(config, list(stages), config_overrides=overrides, use_gloo_process_groups=False)


def build_schedule(optim: Optim, optimizer: MegatronOptimizer, num_steps: int) -> OptimizerParamScheduler:
    """Linear warm-up from 0 over `optim.warmup` of all steps, then the chosen decay. As with Hugging Face's schedules,
    the rate belongs to the steps already done: `min_lr` would be that of one more step."""
    warmup = min(math.ceil(optim.warmup * num_steps), num_steps - 1)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=optim.lr,
        min_lr=optim.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=max(num_steps, 1),
        lr_decay_style=optim.schedule,
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=max(num_steps, 1),
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
