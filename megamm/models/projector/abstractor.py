"""mPLUG-Owl2's visual abstractor: its table. The modules stand in abstractor_layers.py beside this file."""

from megamm.models.options import ProjectorOptions
from megamm.weights.keymap import Dims, Keep, KeyMap, Row


def keys(options: ProjectorOptions) -> KeyMap:
    """The table of the authors' `visual_abstractor`, without that prefix. Releases leave out the position tables."""
    h, a, f = options.out_size, options.in_size, options.ffn_size
    layer, ours = "encoder.layers.{i}.crossattention.", "layers.{i}."
    rows: list[Row | Keep] = [
        Row("query_tokens", ("query_embeds",), (options.num_queries, a), pack="lead1", std=1.0),
        Row("end_token", ("vit_eos",), (h,), pack="lead2", std=1.0),
        Row("linear_out.weight", ("visual_fc.weight",), (h, a)),
        Row("linear_out.bias", ("visual_fc.bias",), (h,)),
    ]
    for name, theirs, shape, tp in (
        ("query_norm", "norm1", (a,), None),
        ("feature_norm", "normk", (a,), None),
        ("linear_q", "attention.query", (a, a), "col"),
        ("linear_k", "attention.key", (a, a), "col"),
        ("linear_v", "attention.value", (a, a), "col"),
        ("linear_proj", "output.out_proj", (a, a), "row"),
        ("mlp_norm", "output.norm2", (a,), None),
        ("linear_gate", "output.mlp.w1", (f, a), "col"),
        ("linear_up", "output.mlp.w3", (f, a), "col"),
        ("inner_norm", "output.mlp.ffn_ln", (f,), "col"),
        ("linear_down", "output.mlp.w2", (a, f), "row"),
    ):
        rows += [
            Row(f"{ours}{name}.weight", (f"{layer}{theirs}.weight",), shape, tp=tp),
            Row(f"{ours}{name}.bias", (f"{layer}{theirs}.bias",), shape[:1], tp=None if tp == "row" else tp),
        ]
    rows += [Keep(f"{layer}attention.{x}_pos_embed") for x in "qk"]
    return KeyMap(rows, Dims(layers=options.num_layers))
