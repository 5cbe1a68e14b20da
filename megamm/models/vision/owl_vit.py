"""mPLUG-Owl2's vision tower: CLIP's shape with a norm behind the last block, the features of all positions used.

Its queries, keys and values are one tensor, head by head, as megatron-core has them. Source: arXiv 2311.04257, section
3.1, and the authors' mplug_owl2/model.
"""

from typing import Any

from megamm.models.options import VisionOptions
from megamm.models.vision import clip
from megamm.models.vision.fields import Fields
from megamm.weights.keymap import Dims, KeyMap, Row

MODEL_TYPE = "mplug_owl_vision_model"
DEFAULTS: dict[str, Any] = {
    # What the authors' MplugOwlVisionConfig assumes for a field that config.json leaves out.
    "model_type": MODEL_TYPE,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_channels": 3,
    "image_size": 448,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-6,
    "use_cls_token": True,
    "use_post_layernorm": True,
}
_FIELDS = Fields(
    model_type=MODEL_TYPE,
    defaults=DEFAULTS,
    only={"num_channels": 3, "hidden_act": "quick_gelu", "use_cls_token": True, "use_post_layernorm": True},
    fixed={
        "activation": "quick_gelu",
        "has_class_token": True,
        "has_pre_norm": True,
        "has_patch_bias": False,
        "has_post_norm": True,
    },
)
from_hf, to_hf = _FIELDS.read, _FIELDS.write

IMAGE = clip.IMAGE


def keys(options: VisionOptions) -> KeyMap:
    """The table of the authors' `vision_model`, without that prefix."""
    h, f, p = options.hidden_size, options.ffn_size, options.patch_size
    layer, ours = "encoder.layers.{i}.", "transformer.layers.{i}."
    rows = [
        Row("class_token", ("embeddings.cls_token",), (h,), pack="lead2"),
        Row("patch_embedding.weight", ("embeddings.patch_embed.weight",), (h, 3, p, p)),
        Row("position_embedding", ("embeddings.position_embedding",), (options.num_positions, h), pack="lead1"),
    ]
    for x, ndim in (("weight", 2), ("bias", 1)):
        row_cut = "row" if x == "weight" else None
        attention, mlp = f"{ours}self_attention.", f"{ours}mlp."
        rows += [
            Row(f"pre_norm.{x}", (f"embeddings.pre_layernorm.{x}",), (h,)),
            Row(f"{attention}linear_qkv.layer_norm_{x}", (f"{layer}input_layernorm.{x}",), (h,)),
            Row(f"{attention}linear_qkv.{x}", (f"{layer}self_attn.query_key_value.{x}",), (3 * h, h)[:ndim], tp="col"),
            Row(f"{attention}linear_proj.{x}", (f"{layer}self_attn.dense.{x}",), (h, h)[:ndim], tp=row_cut),
            Row(f"{mlp}linear_fc1.layer_norm_{x}", (f"{layer}post_attention_layernorm.{x}",), (h,)),
            Row(f"{mlp}linear_fc1.{x}", (f"{layer}mlp.fc1.{x}",), (f, h)[:ndim], tp="col"),
            Row(f"{mlp}linear_fc2.{x}", (f"{layer}mlp.fc2.{x}",), (h, f)[:ndim], tp=row_cut),
            Row(f"post_norm.{x}", (f"post_layernorm.{x}",), (h,)),
        ]
    return KeyMap(rows, Dims(layers=options.num_layers, heads=options.num_heads, groups=options.num_heads))


def start_keys(options: VisionOptions) -> KeyMap:
    """The table of the plain CLIPVisionModel that such a tower begins as, without the leading `vision_model.`."""
    h, p = options.hidden_size, options.patch_size
    rows = [
        Row("class_token", ("embeddings.class_embedding",), (h,)),
        Row("patch_embedding.weight", ("embeddings.patch_embedding.weight",), (h, 3, p, p)),
        Row("position_embedding", ("embeddings.position_embedding.weight",), (options.num_positions, h)),
        *clip.block_rows(options),
    ]
    for x in ("weight", "bias"):
        rows += [
            Row(f"pre_norm.{x}", (f"pre_layrnorm.{x}",), (h,)),
            Row(f"post_norm.{x}", (f"post_layernorm.{x}",), (h,)),
        ]
    return KeyMap(rows, Dims(layers=options.num_layers, heads=options.num_heads, groups=options.num_heads))
