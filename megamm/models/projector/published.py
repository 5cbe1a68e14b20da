"""The projectors as LLaVA's own code and its descendants call them: kind and sizes in config.json, and key names."""

import re
from typing import Any

from megamm.errors import CheckpointError
from megamm.models.options import ProjectorOptions
from megamm.models.projector import mlp
from megamm.weights.keymap import KeyMap


def read(
    name: str, field: str, config: dict[str, Any], kinds: tuple[str, ...], *, in_size: int, out_size: int
) -> ProjectorOptions:
    """Options of the projector that `field` of config.json calls `name`; `kinds` are those that the family has.

    CheckpointError: none of them."""
    kind = "mlpNx_gelu" if re.fullmatch(r"mlp[1-9]\d?x_gelu", name) else name
    if kind not in kinds:
        raise CheckpointError(f"config.json: {field} {name!r} is not supported, only {', '.join(kinds)}")
    return ProjectorOptions(kind=name, in_size=in_size, out_size=out_size)


def keys(options: ProjectorOptions, prefix: str) -> KeyMap:
    """The table in the authors' spelling, every name under `prefix`, which ends with a dot."""
    table = mlp.keys(options).renamed(hf=mlp.sequential(options))
    return table.renamed(ours="projector.", hf={"": prefix})
