"""One linear, or several with an exact GELU between. Tables only; the layers stand in models/projector/layers.py."""

from megamm.models.options import ProjectorOptions
from megamm.weights.keymap import KeyMap, Row


def keys(options: ProjectorOptions) -> KeyMap:
    """The table as transformers' LLaVA spells two of them, without the leading `multi_modal_projector.`.

    In pairs the first is cut by columns, the second by rows, so that only the output of a pair is exchanged; the last
    of an odd number is on every rank.
    """
    h, count = options.out_size, options.num_linears
    rows = []
    for k in range(1, count + 1):
        is_row, is_column = k % 2 == 0, k % 2 == 1 and k < count
        name, width = f"linear_{k}.", options.in_size if k == 1 else h
        rows += [
            Row(name + "weight", (name + "weight",), (h, width), tp="row" if is_row else "col" if is_column else None),
            Row(name + "bias", (name + "bias",), (h,), tp="col" if is_column else None),
        ]
    return KeyMap(rows)


def sequential(options: ProjectorOptions) -> dict[str, str]:
    """Prefixes of `keys` -> those of the authors' nn.Linear or nn.Sequential, whose odd members are activations."""
    if options.kind == "linear":
        return {"linear_1.": ""}
    return {f"linear_{k + 1}.": f"{2 * k}." for k in range(options.num_linears)}
