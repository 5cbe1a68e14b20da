"""What a recipe imports: the dataclasses of a run."""

from megamm.config.schema import PARTS, Checkpoint, Config, Data, Loss, Model, Optim, Parallel, Train

__all__ = ["PARTS", "Checkpoint", "Config", "Data", "Loss", "Model", "Optim", "Parallel", "Train"]
