"""Choose which samples share a sequence, ahead of training: writes PREFIX.packs-TOKENS.npz beside a dataset or a blend.

A run with `--data.packing` packs by itself when it starts, which takes seconds for every 100,000 samples; with
this file it only reads it. Prints how full the sequences are.
"""

import sys
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import tyro
from rich.console import Console

from megamm.data.blend import num_tokens, open_reader
from megamm.data.packing import Sizes, packs_path, write_packs
from megamm.errors import DataError, MegammError


@dataclass(kw_only=True, slots=True)
class Options:
    """Flags of the script; each is one option on the command line."""

    dataset: Annotated[str, tyro.conf.Positional]
    """Prefix of the dataset, or of the blend."""
    max_tokens: int
    """Tokens of a sequence at most: the run's `data.max_tokens`."""
    image_tokens: int = 576
    """Tokens of one picture: of the run's model."""
    sample_tokens: int | None = None
    """Tokens of a sample at most: the positions of the run's model. Default: `max_tokens`, if it has as many."""
    seed: int | None = 42
    """The order in which samples are offered is drawn from it. None: as they are stored, for runs with
    `data.shuffle` False."""


def main(options: Options) -> None:
    """Write the packs and print how full they are. Raises MegammError."""
    sample_tokens = options.max_tokens if options.sample_tokens is None else options.sample_tokens
    if min(options.max_tokens, options.image_tokens, sample_tokens) < 1:
        raise DataError("--max-tokens, --image-tokens, --sample-tokens: give numbers from 1 on")
    reader = open_reader(options.dataset)
    sizes = Sizes(
        capacity=options.max_tokens,
        sample_tokens=sample_tokens,
        tokens_per_image=options.image_tokens,
    )
    packs = write_packs(reader, sizes, options.seed)
    lengths = sizes.lengths(reader)
    cut = int(np.count_nonzero(num_tokens(reader, options.image_tokens) > lengths))
    fill = lengths.sum() / (max(1, len(packs)) * options.max_tokens)
    console = Console(highlight=False)
    for line in (
        f"{packs_path(reader, sizes.capacity)}: {len(reader)} samples in {len(packs)} sequences, "
        f"{len(reader) / max(1, len(packs)):.2f} in each; {lengths.sum()} tokens fill {fill:.1%} of them",
        *([f"{cut} samples are longer than {sizes.longest} tokens and will be cut"] if cut else []),
    ):
        console.print(line, markup=False, soft_wrap=True)


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except MegammError as error:
        sys.exit(f"error: {error}")
