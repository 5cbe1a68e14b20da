"""CLIP's vision tower: class token, a norm before the first block, quick GELU."""

from typing import Any

from megamm.models.options import ImageOptions, VisionOptions
from megamm.models.vision.fields import Fields
from megamm.weights.keymap import Dims, Keep, KeyMap, Row

MODEL_TYPE = "clip_vision_model"
DEFAULTS: dict[str, Any] = {
    # What transformers' CLIPVisionConfig assumes for a field that config.json leaves out.
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_FIELDS = Fields(
    model_type=MODEL_TYPE,
    defaults=DEFAULTS,
    only={"hidden_act": "quick_gelu", "num_channels": 3},
    fixed={"activation": "quick_gelu", "has_class_token": True, "has_pre_norm": True, "has_patch_bias": False},
)
from_hf, to_hf = _FIELDS.read, _FIELDS.write

IMAGE = ImageOptions(
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
    resize="shortest_edge_crop",
)


def block_rows(options: VisionOptions) -> tuple[Row, ...]:
    """The rows of one pre-norm block as CLIP and SigLIP spell it."""
    h, f = options.hidden_size, options.ffn_size
    layer, ours = "encoder.layers.{i}.", "transformer.layers.{i}."
    attention = layer + "self_attn."
    rows = []
    for x, ndim in (("weight", 2), ("bias", 1)):
        row_cut = "row" if x == "weight" else None
        rows += [
            Row(f"{ours}self_attention.linear_qkv.layer_norm_{x}", (f"{layer}layer_norm1.{x}",), (h,)),
            Row(
                f"{ours}self_attention.linear_qkv.{x}",
                tuple(f"{attention}{y}_proj.{x}" for y in "qkv"),
                (3 * h, h)[:ndim],
                pack="qkv",
                tp="col",
            ),
            Row(f"{ours}self_attention.linear_proj.{x}", (f"{attention}out_proj.{x}",), (h, h)[:ndim], tp=row_cut),
            Row(f"{ours}mlp.linear_fc1.layer_norm_{x}", (f"{layer}layer_norm2.{x}",), (h,)),
            Row(f"{ours}mlp.linear_fc1.{x}", (f"{layer}mlp.fc1.{x}",), (f, h)[:ndim], tp="col"),
            Row(f"{ours}mlp.linear_fc2.{x}", (f"{layer}mlp.fc2.{x}",), (h, f)[:ndim], tp=row_cut),
        ]
    return tuple(rows)


def keys(options: VisionOptions) -> KeyMap:
    """The table of a CLIPVisionModel checkpoint, without the leading `vision_model.`."""
    h, blocks = options.hidden_size, block_rows(options)
    rows: tuple[Row | Keep, ...] = (
        Row("class_token", ("embeddings.class_embedding",), (h,)),
        Row(
            "patch_embedding.weight",
            ("embeddings.patch_embedding.weight",),
            (h, 3, options.patch_size, options.patch_size),
        ),
        Row("position_embedding", ("embeddings.position_embedding.weight",), (options.num_positions, h)),
        Row("pre_norm.weight", ("pre_layrnorm.weight",), (h,)),
        Row("pre_norm.bias", ("pre_layrnorm.bias",), (h,)),
        *blocks,
        # The blocks above the one whose output is used, and the norm behind them.
        *(Keep(key) for row in blocks for key in row.hf),
        Keep("post_layernorm.weight"),
        Keep("post_layernorm.bias"),
        Keep("embeddings.position_ids"),
    )
    return KeyMap(rows, Dims(layers=options.num_layers, heads=options.num_heads, groups=options.num_heads))
