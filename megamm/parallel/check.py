"""Checks of a layout that depend on a model's sizes, given as plain numbers; all problems are found at once.

Runs before any process group exists. What a configuration alone shows is in megamm/config/check.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megamm.config.schema import Parallel
from megamm.errors import ConfigError
from megamm.parallel.placement import Unit, choose_layout


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """What tensor parallelism divides in one part of the model; None where a part has no such size."""

    heads: int | None = None
    """Attention heads."""
    groups: int | None = None
    """Key/value groups; equal to `heads` without grouped queries."""
    ffn: int | None = None
    """Width inside the MLP."""
    vocab: int | None = None
    """Rows of the embedding, padding included."""


def check_sizes(parallel: Parallel, parts: Mapping[str, Sizes], units: Sequence[Unit]) -> None:
    """Raise ConfigError with everything that keeps a model of these sizes from being laid out as `parallel` says."""
    if problems := find_size_problems(parallel, parts, units):
        raise ConfigError(problems)


def find_size_problems(parallel: Parallel, parts: Mapping[str, Sizes], units: Sequence[Unit]) -> list[str]:
    """Everything that keeps a model of these sizes from being laid out so; each problem names field and legal values.

    parts: the sizes by part, such as {"vision": ..., "llm": ...}. units: the flat list that the pipeline cuts.
    """
    problems = []
    if parallel.tp < 1 or parallel.pp < 1:
        return [f"parallel.tp={parallel.tp}, parallel.pp={parallel.pp}: both must be 1 or more"]
    misfits = [f"{part} has {size}" for part, sizes in parts.items() for size in _misfits(parallel.tp, sizes)]
    if misfits:
        largest = max(sizes.heads or sizes.ffn or 1 for sizes in parts.values())
        legal = [tp for tp in range(1, largest + 1) if not any(_misfits(tp, sizes) for sizes in parts.values())]
        problems.append(
            f"parallel.tp={parallel.tp} does not fit: {'; '.join(misfits)}; legal for this model: "
            f"{', '.join(map(str, legal))}"
        )
    try:
        choose_layout(parallel, units)
    except ConfigError as error:
        problems += error.problems
    return problems


def _misfits(tp: int, sizes: Sizes) -> list[str]:
    """What tp does not divide. megatron-core copies key/value groups to several ranks when there are fewer than tp."""
    found = [
        f"{size} {noun}, not divisible"
        for size, noun in (
            (sizes.heads, "attention heads"),
            (sizes.ffn, "columns in the MLP"),
            (sizes.vocab, "rows in the vocabulary"),
        )
        if size is not None and size % tp
    ]
    if sizes.groups is not None and sizes.groups % tp and tp % sizes.groups:
        found.append(f"{sizes.groups} key/value groups, neither a multiple nor a divisor")
    return found
