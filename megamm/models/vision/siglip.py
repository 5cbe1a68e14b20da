"""SigLIP's vision tower: no class token, no norm before the first block, tanh GELU, a bias on the patches. Its norm
behind the last block and its pooling head are kept and never computed with. Source: arXiv 2303.15343, transformers."""

from typing import Any

from megamm.errors import CheckpointError
from megamm.models.family import overlay
from megamm.models.options import ImageOptions, VisionOptions
from megamm.models.vision.clip import block_rows, used_layers
from megamm.weights.keymap import Dims, Keep, KeyMap, Row

MODEL_TYPE = "siglip_vision_model"
DEFAULTS: dict[str, Any] = {
    # What transformers' SiglipVisionConfig assumes for a field that config.json leaves out.
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}

IMAGE = ImageOptions(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), resize="squash")

_HEAD = (
    "probe", "attention.in_proj_weight", "attention.in_proj_bias", "attention.out_proj.weight",
    "attention.out_proj.bias", "layernorm.weight", "layernorm.bias", "mlp.fc1.weight", "mlp.fc1.bias",
    "mlp.fc2.weight", "mlp.fc2.bias",
)  # fmt: skip


def keys(options: VisionOptions) -> KeyMap:
    """The table of a SiglipVisionModel checkpoint, without the leading `vision_model.`."""
    h, patch, blocks = options.hidden_size, options.patch_size, block_rows(options)
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


def from_hf(config: dict[str, Any], feature_layer: int, keep_first_token: bool) -> VisionOptions:
    """vision_config -> options. `keep_first_token` False: the first patch is lost, as TinyLLaVA_Factory's releases and
    transformers' feature strategy `default` have it."""
    get = {**DEFAULTS, **config}.__getitem__
    if get("hidden_act") != "gelu_pytorch_tanh" or get("num_channels") != 3:
        raise CheckpointError(
            f"config.json: SigLIP with hidden_act {get('hidden_act')!r} and num_channels {get('num_channels')} is not "
            "supported, only gelu_pytorch_tanh and 3"
        )
    return VisionOptions(
        num_layers=used_layers(feature_layer, get("num_hidden_layers")),
        stored_layers=get("num_hidden_layers"),
        hidden_size=get("hidden_size"),
        ffn_size=get("intermediate_size"),
        num_heads=get("num_attention_heads"),
        image_size=get("image_size"),
        patch_size=get("patch_size"),
        activation="gelu_tanh",
        norm_eps=get("layer_norm_eps"),
        has_class_token=False,
        keep_first_token=keep_first_token,
        has_pre_norm=False,
        has_patch_bias=True,
        model_type=MODEL_TYPE,
    )


def to_hf(options: VisionOptions, source: dict[str, Any]) -> dict[str, Any]:
    """Options -> vision_config, written over the one they came from."""
    known = {
        "model_type": MODEL_TYPE,
        "hidden_size": options.hidden_size,
        "intermediate_size": options.ffn_size,
        "num_hidden_layers": options.stored_layers,
        "num_attention_heads": options.num_heads,
        "image_size": options.image_size,
        "patch_size": options.patch_size,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": options.norm_eps,
    }
    return overlay(source, known, DEFAULTS)
