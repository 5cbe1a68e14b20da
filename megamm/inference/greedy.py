"""Greedy decoding at any layout, by running the whole sequence again for every token."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megamm import backend
from megamm.batch import Batch, Sample
from megamm.data.loader import collate
from megamm.parallel.groups import gather_over_tp
from megamm.training.step import Stages, fewest_batches, run_pipeline


def greedy(
    stages: Stages,
    prompts: Sequence[Sample],
    num_tokens: int,
    *,
    tokens_per_image: int,
    image_size: int,
    eos_id: int | None,
) -> list[list[int]]:
    """The `num_tokens` most likely next tokens of each prompt; every rank must call it with the same prompts.

    prompts: expanded, labels ignored. A row ends before `eos_id`; None: never. Same result on every rank.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    ids = [prompt.ids_S.tolist() for prompt in prompts]
    answers: list[list[int]] = [[] for _ in prompts]
    is_open = [True] * len(prompts)
    for _ in range(num_tokens):
        samples = [
            Sample(
                ids_S=torch.tensor(row, dtype=torch.int64),
                labels_S=torch.tensor(row, dtype=torch.int64),
                pixels_I3HW=prompt.pixels_I3HW,
                num_images=prompt.num_images,
                starts_I=prompt.starts_I,
            )
            for row, prompt in zip(ids, prompts, strict=True)
        ]
        batch = collate(
            samples,
            pad_id=0,
            pad_multiple=group.size(),
            tokens_per_image=tokens_per_image,
            with_pixels=prompts[0].pixels_I3HW is not None,
            image_size=image_size,
        )
        last = torch.tensor([len(row) - 1 for row in ids])
        next_B = _next_tokens(stages, batch, last)
        for b, token in enumerate(next_B.tolist()):
            is_open[b] = is_open[b] and token != eos_id
            if is_open[b]:
                answers[b].append(token)
            ids[b].append(token)
        if not any(is_open):
            break
    return answers


@torch.no_grad()
def _next_tokens(stages: Stages, batch: Batch, last_B: Tensor) -> Tensor:
    """Most likely token behind position `last_B` of each row, int64 [B], on every rank."""
    reduce = partial(_best, last_B.to(backend.current().device))
    batches = [batch] * fewest_batches(stages)
    reduced = run_pipeline(stages, batches, forward_only=True, keep_logits=True, reduce=reduce)
    device = backend.current().device
    next_B = reduced[0]["best"] if reduced else torch.zeros(len(last_B), dtype=torch.int64, device=device)
    last_stage = parallel_state.get_pipeline_model_parallel_last_rank()
    dist.broadcast(next_B, src=last_stage, group=parallel_state.get_pipeline_model_parallel_group())
    return next_B


def _best(last_B: Tensor, logits_BSV: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """arg-max over the vocabulary of all tensor parallel ranks; of equals the smallest id."""
    logits_BV = logits_BSV[torch.arange(len(last_B), device=last_B.device), last_B].float()
    value_B, index_B = logits_BV.max(dim=-1)
    index_B = index_B + parallel_state.get_tensor_model_parallel_rank() * logits_BV.size(-1)
    values_TB = torch.stack(gather_over_tp(value_B))
    indices_TB = torch.stack(gather_over_tp(index_B))
    best_B = indices_TB.gather(0, values_TB.argmax(dim=0, keepdim=True))[0]
    return logits_BV.sum() * 0, torch.ones((), dtype=torch.int32, device=last_B.device), {"best": best_B}
