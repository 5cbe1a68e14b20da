"""Import a Hugging Face checkpoint, or join a plain llm and a plain vision tower: writes a megamm checkpoint (megatron
torch_dist) that loads at every layout."""

import sys
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Column, Table

from megamm import registry
from megamm.errors import ConfigError, MegammError
from megamm.weights.convert import HfCheckpoint, open_hf, open_start, with_image_size, write_checkpoint


def hf_to_megatron(
    output: Path,
    hf: Path | None = None,
    family: str | None = None,
    tower: Path | None = None,
    llm: Path | None = None,
    seed: int = 0,
    image_size: int | None = None,
) -> None:
    """Write a megamm checkpoint, one tensor in memory, dtypes as they are.

    Either of a whole model: --hf, and --tower where its vision tower is published apart. Or the start of a pretrain:
    --llm, --tower and --family; what is in neither, the projector, is drawn, or taken from --hf.

    Args:
        output: Directory to write; must not exist yet, or be empty.
        hf: Directory of a checkpoint: config.json and safetensors or .bin files, single or sharded. With --llm: one
            that holds only a projector, such as mm_projector.bin, or only a config.json that says what the model is.
        family: Family of the model. By default the only one whose configuration and key names fit.
        tower: Directory of a separately published vision tower; fills only the tensors that `hf` lacks.
        llm: Directory of a plain decoder; its tokenizer becomes the model's.
        image_size: Side of the pictures in pixels, where it shall be another than the tower was made for: its positions
            are interpolated. mPLUG-Owl2 only, which is pretrained with small pictures and tuned with large ones.
        seed: What is drawn depends on this and on the tensors' names alone.
    """
    if llm is None:
        if hf is None:
            raise ConfigError(["give --hf for a whole model, or --llm, --tower and --family for the start of one"])
        families = [registry.family(family)] if family else list(registry.FAMILIES.values())
        found = _sized(open_hf(hf, tower, families), image_size)
        write_checkpoint(found, output, hf)
        for name, other in found.duplicated.items():
            print(f"{output}: {name} is absent and duplicated from {other}")
        print(f"{output}: imported from {hf} as family {found.info.family}, dialect {found.info.dialect}")
        return
    if tower is None or family is None:
        raise ConfigError(["--llm needs --tower and --family: a start is made of an llm and a vision tower"])
    start = _sized(open_start(llm, tower, registry.family(family), seed, hf), image_size)
    write_checkpoint(start, output, llm, tower)
    Console().print(origins(start))
    print(f"{output}: a start of family {family}, seed {seed}")


def _sized(checkpoint: HfCheckpoint, image_size: int | None) -> HfCheckpoint:
    return checkpoint if image_size is None else with_image_size(checkpoint, image_size)


def origins(start: HfCheckpoint) -> Table:
    """Where the tensors came from, by part."""
    table = Table("part", "tensors", "parameters", "how", Column("from", overflow="fold"))
    for (part, how, directory), names in start.origins().items():
        parameters = sum(start.table[name].num_elements for name in names)
        table.add_row(part, str(len(names)), f"{parameters:,}", how, directory)
    return table


if __name__ == "__main__":
    try:
        tyro.cli(hf_to_megatron)
    except (MegammError, OSError) as error:
        sys.exit(f"error: {error}")
