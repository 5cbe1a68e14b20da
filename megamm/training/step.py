"""One training step. Read this first: batches -> megatron-core's schedule -> `VLM.forward` -> gradients -> optimizer.

Losses are summed over tokens and divided once by the supervised tokens of the whole global batch, so that neither the
micro-batch size nor the layout changes the result.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config
from torch import Tensor

from megamm import backend
from megamm.batch import IGNORE, Batch

Stages = Sequence[Any]
"""The virtual stages of this rank, in pipeline order, each a VLM behind DDP or bare."""
Reduce = Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What one step did, the same on every rank."""

    loss: float
    """Mean over the supervised tokens of the global batch."""
    grad_norm: float
    """Global L2 norm of the gradients before clipping."""


def train_step(stages: Stages, optimizer: MegatronOptimizer, batches: Sequence[Batch]) -> StepResult:
    """Forward and backward over this rank's micro-batches of one global batch, then one optimizer step.

    stages: the DDP-wrapped virtual stages of this rank. Every rank gets the same number of micro-batches.
    """
    for stage in stages:
        stage.zero_grad_buffer()
    optimizer.zero_grad()
    loss, _ = mean_loss(run_pipeline(stages, batches))
    _, grad_norm, _ = optimizer.step()
    return StepResult(loss=loss, grad_norm=float(grad_norm))


def forward_step(
    iterator: Iterator[Batch], stage: Any, reduce: Reduce | None = None, keep_logits: bool = False
) -> tuple[Tensor, Reduce]:
    """One micro-batch through one stage; on the last stage the schedule then calls the returned reduction."""
    batch = to_device(next(iterator))
    output = stage(batch, keep_logits=keep_logits)
    return output, reduce or partial(token_loss, batch)


def token_loss(batch: Batch, loss_BS: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss of every position, float32 [B, S] -> (sum over targets, their number as int32, the same for the log)."""
    is_target = batch.targets_BS != IGNORE
    # where, not a product: a position without a target may hold an infinite loss.
    total = torch.where(is_target, loss_BS, 0.0).sum()
    count = is_target.sum().int()
    return total, count, {"loss": total.detach(), "targets": count}


def run_pipeline(
    stages: Stages,
    batches: Sequence[Batch],
    *,
    forward_only: bool = False,
    reduce: Reduce | None = None,
    keep_logits: bool = False,
) -> list[dict[str, Tensor]]:
    """Run all micro-batches through megatron-core's schedule for this layout.

    Returns what the reduction (`token_loss` by default) gave for each micro-batch; empty on all stages but the last.
    Afterwards gradients are reduced over data parallel ranks and divided by the global number of targets.
    """
    config = get_model_config(stages[0])
    virtual = config.virtual_pipeline_model_parallel_size
    run = get_forward_backward_func(config.pipeline_model_parallel_size, virtual)
    return run(
        forward_step_func=partial(forward_step, reduce=reduce, keep_logits=keep_logits),
        data_iterator=[iter(batches) for _ in stages] if virtual else iter(batches),
        model=list(stages) if virtual else stages[0],
        num_microbatches=len(batches),
        # Stages exchange the shape of every tensor; these two only have to be numbers.
        seq_length=1,
        micro_batch_size=1,
        forward_only=forward_only,
    )


def fewest_batches(stages: Stages) -> int:
    """The number of micro-batches must be a multiple of this: interleaving passes them on in groups of pp."""
    config = get_model_config(stages[0])
    return config.pipeline_model_parallel_size if config.virtual_pipeline_model_parallel_size else 1


def mean_loss(reduced: Sequence[dict[str, Tensor]]) -> tuple[float, int]:
    """Mean loss and number of targets over all micro-batches of all ranks, the same on every rank.

    Every tensor parallel rank of the last stage has the same numbers, so their share cancels in the mean.
    """
    device = backend.current().device
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for item in reduced:
        sums[0] += item["loss"]
        sums[1] += item["targets"]
    dist.all_reduce(sums)
    copies = parallel_state.get_tensor_model_parallel_world_size()
    return (sums[0] / sums[1].clamp(min=1)).item(), int(sums[1].item()) // copies


def to_device(batch: Batch) -> Batch:
    """The batch on this process's device; copies from pinned memory overlap with compute."""
    device = backend.current().device
    return batch.map(lambda x: x.to(device, non_blocking=True))
