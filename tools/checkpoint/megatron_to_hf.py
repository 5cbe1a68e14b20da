"""Export a megamm checkpoint: writes a Hugging Face directory that stock loaders read."""

import sys
from pathlib import Path

import tyro

from megamm.errors import MegammError
from megamm.release import export
from megamm.weights.directory import find_checkpoint


def megatron_to_hf(checkpoint: Path, output: Path, dialect: str | None = None, template: str | None = None) -> None:
    """Export a megamm checkpoint to a Hugging Face directory, one tensor in memory, dtypes as they are.

    Args:
        checkpoint: Directory of a checkpoint, or of a run, whose newest checkpoint is taken.
        output: Directory to write; must not exist yet, or be empty.
        dialect: How to spell the keys. By default as in the checkpoint that was imported. `hf`: transformers' own.
        template: Conversation template of an `hf` export that had none. By default the family's.
    """
    found = find_checkpoint(checkpoint)
    written = export(found, output, dialect, template)
    print(f"{output}: exported from {found} in dialect {written}")


if __name__ == "__main__":
    try:
        tyro.cli(megatron_to_hf)
    except (MegammError, OSError) as error:
        sys.exit(f"error: {error}")
