"""Export a megamm checkpoint: writes a Hugging Face directory that stock loaders read."""

import sys
from pathlib import Path

import tyro

from megamm import registry
from megamm.errors import MegammError
from megamm.weights.convert import export_hf
from megamm.weights.directory import find_checkpoint, read_info


def megatron_to_hf(checkpoint: Path, output: Path, dialect: str | None = None) -> None:
    """Export a megamm checkpoint to a Hugging Face directory, one tensor in memory, dtypes as they are.

    Args:
        checkpoint: Directory of a checkpoint, or of a run, whose newest checkpoint is taken.
        output: Directory to write; must not exist yet, or be empty.
        dialect: How to spell the keys. By default as in the checkpoint that was imported.
    """
    found = find_checkpoint(checkpoint)
    written = export_hf(found, registry.family(read_info(found).family), output, dialect)
    print(f"{output}: exported from {found} in dialect {written}")


if __name__ == "__main__":
    try:
        tyro.cli(megatron_to_hf)
    except (MegammError, OSError) as error:
        sys.exit(f"error: {error}")
