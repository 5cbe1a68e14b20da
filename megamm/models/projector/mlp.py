"""The projectors of the LLaVA line: one linear, or two with an exact GELU between. Tables only; the layers stand in
models/projector/layers.py."""

from megamm.models.options import ProjectorOptions
from megamm.weights.keymap import KeyMap, Row


def keys(options: ProjectorOptions) -> KeyMap:
    """The table of the projector as transformers' LLaVA spells it, without the leading `multi_modal_projector.`."""
    h, hv = options.out_size, options.in_size
    if options.kind == "linear":
        return KeyMap(
            (
                Row("linear_1.weight", ("linear_1.weight",), (h, hv)),
                Row("linear_1.bias", ("linear_1.bias",), (h,)),
            )
        )
    return KeyMap(
        (
            Row("linear_1.weight", ("linear_1.weight",), (h, hv), tp="col"),
            Row("linear_1.bias", ("linear_1.bias",), (h,), tp="col"),
            Row("linear_2.weight", ("linear_2.weight",), (h, h), tp="row"),
            Row("linear_2.bias", ("linear_2.bias",), (h,)),
        )
    )
