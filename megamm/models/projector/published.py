"""The projectors as LLaVA's own code and its descendants call them: kind and sizes in config.json, and key names."""

import re
from typing import Any

from megamm.errors import CheckpointError
from megamm.models.options import ProjectorOptions
from megamm.models.projector import mlp, resampler
from megamm.weights.keymap import KeyMap

_RESAMPLERS = ("resampler", "perceiver")
_SIZES = {"num_queries": "num_queries", "num_resampler_layers": "num_layers", "resampler_hidden_size": "hidden_size"}
DEFAULTS: dict[str, Any] = {"num_queries": 128, "num_resampler_layers": 3, "resampler_hidden_size": 768}
"""What the authors' code assumes for a field that config.json leaves out."""


def read(
    config: dict[str, Any], field: str, default: str, kinds: tuple[str, ...], *, in_size: int, out_size: int
) -> ProjectorOptions:
    """Options of the projector that `field` of config.json names, by `default` where it does not; `kinds` are those
    that the spelling has.

    CheckpointError: none of them."""
    name = config.get(field) or default
    kind = "mlpNx_gelu" if re.fullmatch(r"mlp[1-9]\d?x_gelu", name) else name
    found = next((known for known in kinds if known == kind or (kind == "resampler" and known in _RESAMPLERS)), None)
    if found is None:
        known = dict.fromkeys("resampler" if kind in _RESAMPLERS else kind for kind in kinds)
        raise CheckpointError(f"config.json: {field} {name!r} is not supported, only {', '.join(known)}")
    if found not in _RESAMPLERS:
        return ProjectorOptions(kind=name, in_size=in_size, out_size=out_size)
    sizes = {ours: config.get(theirs, DEFAULTS[theirs]) for theirs, ours in _SIZES.items()}
    return resampler.options(found, in_size=in_size, out_size=out_size, **sizes)


def write(projector: ProjectorOptions, field: str, kinds: tuple[str, ...]) -> dict[str, Any]:
    """The inverse of `read`. CheckpointError: a projector that is none of `kinds`."""
    if projector.kind not in kinds and (projector.kind in _RESAMPLERS or "mlpNx_gelu" not in kinds):
        raise CheckpointError(
            f"this spelling has no projector of kind {projector.kind!r}, only {', '.join(kinds)}; export in another "
            "--dialect"
        )
    if projector.kind not in _RESAMPLERS:
        return {field: projector.kind}
    out = {field: "resampler"} | {theirs: getattr(projector, ours) for theirs, ours in _SIZES.items()}
    if projector.kind == "perceiver":
        del out["resampler_hidden_size"]  # it is as wide as the llm
    return out


def keys(options: ProjectorOptions, prefix: str) -> KeyMap:
    """The table in the authors' spelling, every name under `prefix`, which ends with a dot."""
    if options.kind in _RESAMPLERS:
        table = resampler.keys(options)
    else:
        table = mlp.keys(options).renamed(hf=mlp.sequential(options))
    return table.renamed(ours="projector.", hf={"": prefix})
