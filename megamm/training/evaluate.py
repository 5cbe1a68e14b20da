"""The evaluation loss: one pass over a dataset, no gradients, the same number on every rank."""

import torch

from megamm.data.loader import Loader
from megamm.training.step import Stages, mean_loss, run_pipeline


@torch.no_grad()
def evaluate(stages: Stages, loader: Loader) -> float:
    """Mean loss over the supervised tokens of every sample that `loader` gives; each is counted once. A loss of several
    terms is that of each global batch, weighted by its supervised tokens."""
    total, count = 0.0, 0
    for stage in stages:
        stage.eval()
    for batches in loader:
        loss, num_targets = mean_loss(run_pipeline(stages, batches, forward_only=True))
        total += loss * num_targets
        count += num_targets
    for stage in stages:
        stage.train()
    return total / max(count, 1)
