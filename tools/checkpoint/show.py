"""Show what a megamm checkpoint holds: names, shapes, dtypes, and parameters by part."""

import sys
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from megamm import registry
from megamm.errors import MegammError
from megamm.weights.directory import KEPT, find_checkpoint, read_info
from megamm.weights.hf import HfSource, TensorInfo
from megamm.weights.torch_dist import StoredTensors


def show(checkpoint: Annotated[Path, tyro.conf.Positional]) -> None:
    """Show the tensors of a megamm checkpoint and its parameters by part.

    Args:
        checkpoint: Directory of a checkpoint, or of a run, whose newest checkpoint is taken.
    """
    directory = find_checkpoint(checkpoint)
    info = read_info(directory)
    family = registry.family(info.family)
    options = family.read(info.hf_config, info.tower_config)
    names = {entry.name for entry in family.keys[info.dialect](options).entries()}
    stored = StoredTensors(directory).infos
    model = {name: tensor for name, tensor in stored.items() if name in names}
    beside = {name: tensor for name, tensor in stored.items() if name not in names}
    kept = HfSource.of_file(directory / KEPT).infos if (directory / KEPT).exists() else {}
    parts: dict[str, list[TensorInfo]] = defaultdict(list)
    for name, tensor in model.items():
        parts[name.split(".")[0]].append(tensor)

    tensors = Table("tensor", "shape", "dtype", title=f"{directory}: family {info.family}, dialect {info.dialect}")
    for name, tensor in model.items():
        tensors.add_row(name, " x ".join(map(str, tensor.shape)), str(tensor.dtype).removeprefix("torch."))
    summary = Table("part", "tensors", "parameters", "MB")
    groups = {**parts, "model": list(model.values())}
    if kept:
        groups["kept, never computed with"] = list(kept.values())
    if beside:
        groups["optimizer and other state"] = list(beside.values())
    for part, members in groups.items():
        count, size = sum(t.num_elements for t in members), sum(t.num_bytes for t in members)
        summary.add_row(part, str(len(members)), f"{count:,}", f"{size / 1e6:,.2f}")
    # A pipe has no width of its own, and 80 columns would cut the names.
    console = Console(width=max(Console().width, 60 + max(map(len, model), default=0)))
    console.print(tensors, summary)


if __name__ == "__main__":
    try:
        tyro.cli(show)
    except (MegammError, OSError) as error:
        sys.exit(f"error: {error}")
