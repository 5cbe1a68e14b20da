"""Blend indexed datasets: weights or token budgets over them -> one order, that training reads like one dataset.

Writes OUTPUT.json, a small file that names the datasets; give OUTPUT as `data.path`. Without weights and budgets every
sample is there once.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from megamm.data.blend import Blend, counts_by_tokens, counts_by_weight, num_tokens, write_blend
from megamm.data.indexed import Reader
from megamm.errors import DataError, MegammError


@dataclass(kw_only=True, slots=True)
class Options:
    """Flags of the script; each is one option on the command line."""

    datasets: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Prefixes of the datasets."""
    output: Path
    """Prefix of the blend."""
    weights: tuple[float, ...] = ()
    """Share of each dataset in the samples of an epoch, in any unit."""
    samples: int | None = None
    """Samples of an epoch, for `weights`. Default: as many as can be without any sample twice."""
    tokens: tuple[int, ...] = ()
    """Tokens of each dataset in an epoch, instead of weights; more than it has repeats it."""
    image_tokens: int = 576
    """Tokens of one picture, for `tokens` and the table."""
    seed: int = 0
    """Which samples are taken of a dataset that is not taken whole, and their order, are drawn from it."""


def main(options: Options) -> None:
    """Write the blend and print what an epoch of it holds. Raises MegammError."""
    readers = [Reader(prefix) for prefix in options.datasets]
    _check(options)
    sizes = [len(reader) for reader in readers]
    if options.tokens:
        counts = counts_by_tokens(readers, options.tokens, options.image_tokens, options.seed)
    elif options.weights:
        counts = counts_by_weight(options.weights, sizes, options.samples)
    else:
        counts = sizes
    _print(write_blend(options.output, readers, counts, options.seed), options.image_tokens)


def _check(options: Options) -> None:
    if not options.datasets:
        raise DataError("no dataset to blend; give their prefixes")
    if options.weights and options.tokens:
        raise DataError("--weights and --tokens: give one of them")
    for name, values in (("weights", options.weights), ("tokens", options.tokens)):
        if values and len(values) != len(options.datasets):
            raise DataError(f"--{name}: {len(values)} numbers for {len(options.datasets)} datasets; give one for each")
    if options.samples is not None and (options.samples < 1 or not options.weights):
        raise DataError(f"--samples: {options.samples}; give a number from 1 on, with --weights")
    if options.image_tokens < 1:
        raise DataError(f"--image-tokens: {options.image_tokens}; give a number from 1 on")


def _print(blend: Blend, image_tokens: int) -> None:
    tokens = num_tokens(blend, image_tokens)
    console = Console(highlight=False)
    for k, (reader, count) in enumerate(zip(blend.readers, blend.counts, strict=True)):
        of_member = int(tokens[blend.member == k].sum())
        share = of_member / max(1, int(tokens.sum()))
        console.print(
            f"{reader.prefix}: {count} samples of {len(reader)}, {of_member} tokens ({share:.2%})",
            markup=False,
            soft_wrap=True,
        )
    console.print(f"{blend.prefix}: {len(blend)} samples, {tokens.sum()} tokens", markup=False, soft_wrap=True)


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except MegammError as error:
        sys.exit(f"error: {error}")
