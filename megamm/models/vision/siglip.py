"""SigLIP's vision tower: no class token, no norm before the first block, tanh GELU, a bias on the patches. Its norm
behind the last block and its pooling head are kept and never computed with. Source: arXiv 2303.15343, transformers."""

from typing import Any

from megamm.models.options import ImageOptions, VisionOptions
from megamm.models.vision import clip
from megamm.models.vision.fields import Fields
from megamm.weights.keymap import Dims, Keep, KeyMap, Row

MODEL_TYPE = "siglip_vision_model"
DEFAULTS: dict[str, Any] = {
    # What transformers' SiglipVisionConfig assumes for a field that config.json leaves out.
    **clip.DEFAULTS,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
_FIELDS = Fields(
    model_type=MODEL_TYPE,
    defaults=DEFAULTS,
    only={"hidden_act": "gelu_pytorch_tanh", "num_channels": 3},
    fixed={"activation": "gelu_tanh", "has_class_token": False, "has_pre_norm": False, "has_patch_bias": True},
)
from_hf, to_hf = _FIELDS.read, _FIELDS.write

IMAGE = ImageOptions(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), resize="squash")

_HEAD = (
    "probe", "attention.in_proj_weight", "attention.in_proj_bias", "attention.out_proj.weight",
    "attention.out_proj.bias", "layernorm.weight", "layernorm.bias", "mlp.fc1.weight", "mlp.fc1.bias",
    "mlp.fc2.weight", "mlp.fc2.bias",
)  # fmt: skip


def keys(options: VisionOptions) -> KeyMap:
    """The table of a SiglipVisionModel checkpoint, without the leading `vision_model.`."""
    h, patch, blocks = options.hidden_size, options.patch_size, clip.block_rows(options)
    rows: tuple[Row | Keep, ...] = (
        Row("patch_embedding.weight", ("embeddings.patch_embedding.weight",), (h, 3, patch, patch)),
        Row("patch_embedding.bias", ("embeddings.patch_embedding.bias",), (h,)),
        Row("position_embedding", ("embeddings.position_embedding.weight",), (options.num_positions, h)),
        *blocks,
        # The blocks above the one whose output is used, the norm and the head behind them. A release may hold fewer
        # blocks than its config.json counts.
        *(Keep(key) for row in blocks for key in row.hf),
        Keep("post_layernorm.weight"),
        Keep("post_layernorm.bias"),
        *(Keep(f"head.{name}") for name in _HEAD),
        Keep("embeddings.position_ids"),
    )
    return KeyMap(rows, Dims(layers=options.num_layers, heads=options.num_heads, groups=options.num_heads))
