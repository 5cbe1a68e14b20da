"""The projectors of the LLaVA line: one linear, or two with an exact GELU between. Tables only; the layers stand in
models/projector/layers.py."""

from megamm.models.options import ProjectorOptions
from megamm.weights.keymap import KeyMap, Row

LINEAR_ROWS = (
    Row("linear_1.weight", ("linear_1.weight",)),
    Row("linear_1.bias", ("linear_1.bias",)),
)
MLP_ROWS = (
    Row("linear_1.weight", ("linear_1.weight",), tp="col"),
    Row("linear_1.bias", ("linear_1.bias",), tp="col"),
    Row("linear_2.weight", ("linear_2.weight",), tp="row"),
    Row("linear_2.bias", ("linear_2.bias",)),
)


def keys(options: ProjectorOptions) -> KeyMap:
    """The table of the projector as transformers' LLaVA spells it, without the leading `multi_modal_projector.`."""
    return KeyMap(LINEAR_ROWS if options.kind == "linear" else MLP_ROWS)
