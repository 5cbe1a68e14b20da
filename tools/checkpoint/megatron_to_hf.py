"""Export a megamm checkpoint: writes a Hugging Face directory that stock loaders read."""

import sys
from pathlib import Path

import tyro

from megamm import registry
from megamm.data.template import template as data_template
from megamm.errors import MegammError
from megamm.inference.processor import write_processor
from megamm.models.options import VlmOptions
from megamm.weights.convert import export_hf
from megamm.weights.directory import find_checkpoint, read_info


def megatron_to_hf(checkpoint: Path, output: Path, dialect: str | None = None, template: str | None = None) -> None:
    """Export a megamm checkpoint to a Hugging Face directory, one tensor in memory, dtypes as they are.

    Args:
        checkpoint: Directory of a checkpoint, or of a run, whose newest checkpoint is taken.
        output: Directory to write; must not exist yet, or be empty.
        dialect: How to spell the keys. By default as in the checkpoint that was imported.
        template: Conversation format of the chat template that goes with dialect hf. By default the family's.
    """
    found = find_checkpoint(checkpoint)
    family = registry.family(read_info(found).family)
    notes: list[str] = []

    def finish(directory: Path, dialect: str, options: VlmOptions) -> None:
        """Of transformers' own class, all that it takes to prompt it."""
        if dialect == "hf":
            note = write_processor(directory, options, data_template(template or family.template))
            notes.extend([note] if note else [])

    written = export_hf(found, family, output, dialect, finish)
    for note in notes:
        print(note)
    print(f"{output}: exported from {found} in dialect {written}")


if __name__ == "__main__":
    try:
        tyro.cli(megatron_to_hf)
    except (MegammError, OSError) as error:
        sys.exit(f"error: {error}")
