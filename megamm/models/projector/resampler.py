"""Learned queries that attend to the image features and become the visual tokens. Tables and options only; the layers
stand in models/projector/resampler_layers.py.

`resampler` is TinyLLaVA Bench's: queries of a width of their own, which attend to the features. `perceiver` is
TinyLLaVA_Factory's: queries as wide as the llm, which attend to the features and to each other. Source: Flamingo, arXiv
2204.14198, and the code of both.
"""

from megamm.errors import CheckpointError
from megamm.models.options import ProjectorOptions
from megamm.weights.keymap import Dims, KeyMap, Row


def options(
    kind: str, *, in_size: int, out_size: int, num_queries: int, num_layers: int, hidden_size: int
) -> ProjectorOptions:
    """Options of either kind; heads are not in any config.json. CheckpointError: heads that do not divide the width."""
    heads, head_dim = 8, 64
    if kind == "perceiver":
        hidden_size = out_size
    else:
        heads = 8 if hidden_size == 512 else 12
        head_dim, rest = divmod(hidden_size, heads)
        if rest:
            raise CheckpointError(f"config.json: resampler_hidden_size {hidden_size} must be a multiple of {heads}")
    return ProjectorOptions(
        kind=kind,
        in_size=in_size,
        out_size=out_size,
        num_queries=num_queries,
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=heads,
        head_dim=head_dim,
        ffn_size=4 * hidden_size,
    )


def keys(options: ProjectorOptions) -> KeyMap:
    """The table in the authors' spelling, without the leading name of the projector. Heads and the MLP are cut."""
    d, inner = options.hidden_size, options.num_heads * options.head_dim
    ours = "layers.{i}."
    if options.kind == "perceiver":
        attention, mlp, width = "layers.{i}.0.", "layers.{i}.1.", d
        hidden, image = "norm_latents", "norm_media"
        outer = [
            Row("queries", ("latents",), (options.num_queries, d)),
            Row("linear_in.weight", ("linear.weight",), (d, options.in_size)),
            Row("linear_in.bias", ("linear.bias",), (d,)),
            *_norm("norm", "norm", d),
        ]
        kv = Row(f"{ours}linear_kv.weight", (f"{attention}to_kv.weight",), (2 * inner, d), pack="kv_fused", tp="col")
    else:
        attention, mlp, width = "resampler_blocks.{i}.", "resampler_blocks.{i}.feed_forward.", options.in_size
        hidden, image = "norm_hidden", "norm_image"
        outer = [
            Row("queries", ("queries",), (options.num_queries, d)),
            *_norm("norm", "post_norm", d),
            Row("linear_out.weight", ("final_proj.weight",), (options.out_size, d)),
        ]
        names = (f"{attention}to_k.weight", f"{attention}to_v.weight")
        kv = Row(f"{ours}linear_kv.weight", names, (2 * inner, width), pack="kv", tp="col")
    return KeyMap(
        [
            *outer,
            *_norm(f"{ours}query_norm", attention + hidden, d),
            *_norm(f"{ours}feature_norm", attention + image, width),
            Row(f"{ours}linear_q.weight", (f"{attention}to_q.weight",), (inner, d), tp="col"),
            kv,
            Row(f"{ours}linear_proj.weight", (f"{attention}to_out.weight",), (d, inner), tp="row"),
            *_norm(f"{ours}mlp_norm", f"{mlp}0", d),
            Row(f"{ours}linear_fc1.weight", (f"{mlp}1.weight",), (options.ffn_size, d), tp="col"),
            Row(f"{ours}linear_fc2.weight", (f"{mlp}3.weight",), (d, options.ffn_size), tp="row"),
        ],
        Dims(layers=options.num_layers, heads=options.num_heads, groups=options.num_heads),
    )


def _norm(ours: str, theirs: str, size: int) -> list[Row]:
    return [Row(f"{ours}.{x}", (f"{theirs}.{x}",), (size,)) for x in ("weight", "bias")]
