"""Import a Hugging Face checkpoint: writes a megamm checkpoint (megatron torch_dist) that loads at every layout."""

import sys
from pathlib import Path

import tyro

from megamm import registry
from megamm.errors import MegammError
from megamm.weights.convert import import_hf


def hf_to_megatron(hf: Path, output: Path, family: str | None = None, tower: Path | None = None) -> None:
    """Import a Hugging Face checkpoint into a megamm checkpoint, one tensor in memory, dtypes as they are.

    Args:
        hf: Directory of the checkpoint: config.json and safetensors, single or sharded.
        output: Directory to write; must not exist yet, or be empty.
        family: Family of the model. By default the only one whose configuration and key names fit.
        tower: Directory of a separately published vision tower; fills only the tensors that `hf` lacks.
    """
    families = [registry.family(family)] if family else list(registry.FAMILIES.values())
    info = import_hf(hf, tower, families, output)
    print(f"{output}: imported from {hf} as family {info.family}, dialect {info.dialect}")


if __name__ == "__main__":
    try:
        tyro.cli(hf_to_megatron)
    except (MegammError, OSError) as error:
        sys.exit(f"error: {error}")
