"""One training step. Read this first: batches -> megatron-core's schedule -> `VLM.forward` -> gradients -> optimizer.

Losses are summed over tokens and divided once by the supervised tokens of the whole global batch, so that neither the
micro-batch size nor the layout changes the result.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config, unwrap_model
from torch import Tensor

from megamm import backend
from megamm.batch import IGNORE, Batch
from megamm.models.layers.visual_words import word_targets

Stages = Sequence[Any]
"""The virtual stages of this rank, in pipeline order, each a VLM behind DDP or bare."""
TERMS = ("lm", "vm")
"""The terms that a loss may have, in their order: cross-entropy, and divergence from the visual words."""
Reduce = Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What one step did, the same on every rank."""

    loss: float
    """Mean over the supervised tokens of the global batch."""
    grad_norm: float
    """Global L2 norm of the gradients before clipping."""
    terms: dict[str, float] = field(default_factory=dict)
    """The loss's parts, each a mean of its own, where it has several; see `mean_terms`."""


def train_step(stages: Stages, optimizer: MegatronOptimizer, batches: Sequence[Batch]) -> StepResult:
    """Forward and backward over this rank's micro-batches of one global batch, then one optimizer step.

    stages: the DDP-wrapped virtual stages of this rank. Every rank gets the same number of micro-batches.
    """
    for stage in stages:
        stage.zero_grad_buffer()
    optimizer.zero_grad()
    reduced = run_pipeline(stages, batches)
    loss, _ = mean_loss(reduced)
    terms = mean_terms(stages, reduced)
    _, grad_norm, _ = optimizer.step()
    return StepResult(loss=loss, grad_norm=float(grad_norm), terms=terms)


def forward_step(
    iterator: Iterator[Batch],
    stage: Any,
    reduce: Reduce | None = None,
    keep_logits: bool = False,
    scales: Sequence[float] = (1.0,),
) -> tuple[Tensor, Reduce]:
    """One micro-batch through one stage; on the last stage the schedule then calls the returned reduction."""
    batch = to_device(next(iterator))
    output = stage(batch, keep_logits=keep_logits)
    return output, reduce or partial(token_loss, batch, scales)


def token_loss(batch: Batch, scales: Sequence[float], losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss of every position, float32 [B, S] or [terms, B, S] -> (sum over targets, their number as int32, the same for
    the log). Each term is summed over its own targets and multiplied with its scale."""
    terms = losses if losses.dim() == 3 else losses[None]
    masks = target_masks(batch, len(terms))
    # where, not a product: a position without a target may hold an infinite loss.
    sums = [torch.where(mask, term, 0.0).sum() for mask, term in zip(masks, terms, strict=True)]
    total = torch.stack([scale * x for scale, x in zip(scales, sums, strict=True)]).sum()
    count = masks[0].sum().int()
    log = {"loss": total.detach(), "targets": count}
    for name, x, mask in zip(TERMS, sums, masks, strict=False):
        log |= {f"{name}_sum": x.detach(), f"{name}_targets": mask.sum()}
    return total, count, log


def target_masks(batch: Batch, num_terms: int) -> list[Tensor]:
    """bool [B, S] for each term of the loss: the positions that it is a mean over."""
    return [batch.targets_BS != IGNORE, word_targets(batch)][:num_terms]


def loss_scales(stages: Stages, batches: Sequence[Batch]) -> tuple[float, ...]:
    """What the sum of each term is multiplied with before it is divided, as all gradients are, by the number of targets
    of the global batch: then each term is a mean over its own targets, whatever layout and micro-batches are.

    What is a target shows in the ids, so every rank knows it before the step.
    """
    model = unwrap_model(stages[0])
    if not model.options.has_visual_words:
        return (1.0,)
    counts = torch.stack([torch.stack([mask.sum() for mask in target_masks(batch, 2)]) for batch in batches]).sum(0)
    counts = counts.to(backend.current().device)
    dist.all_reduce(counts, group=parallel_state.get_data_parallel_group())
    targets, words = counts.clamp(min=1).tolist()
    return model.loss.lm_weight, model.loss.vm_weight * targets / words


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
    scales = loss_scales(stages, batches) if reduce is None else ()
    run = get_forward_backward_func(config.pipeline_model_parallel_size, virtual)
    return run(
        forward_step_func=partial(forward_step, reduce=reduce, keep_logits=keep_logits, scales=scales),
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
    """Loss and number of targets over all micro-batches of all ranks, the same on every rank.

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


def mean_terms(stages: Stages, reduced: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """`loss_lm`, the mean cross-entropy over the targets, and `loss_vm`, the mean divergence over the visual tokens
    that something stands before, the same on every rank; {} for a model whose loss has one term only."""
    if not unwrap_model(stages[0]).options.has_visual_words:
        return {}
    sums = torch.zeros(len(TERMS), 2, dtype=torch.float64, device=backend.current().device)
    for item in reduced:
        sums += torch.stack([torch.stack([item[f"{name}_sum"], item[f"{name}_targets"]]) for name in TERMS])
    dist.all_reduce(sums)
    means = sums[:, 0] / sums[:, 1].clamp(min=1)
    return {f"loss_{name}": mean for name, mean in zip(TERMS, means.tolist(), strict=True)}


def to_device(batch: Batch) -> Batch:
    """The batch on this process's device; copies from pinned memory overlap with compute."""
    device = backend.current().device
    return batch.map(lambda x: x.to(device, non_blocking=True))
