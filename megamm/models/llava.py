"""LLaVA-1.5: CLIP ViT, linear or two-layer MLP, Llama; visual tokens replace the marker. Source: arXiv 2310.03744.

The native spelling of transformers exists in three dialects (specification llava_family, 6.2); they differ in prefixes.
"""

from functools import partial
from typing import Any

from megamm.errors import CheckpointError
from megamm.models.family import Family, overlay
from megamm.models.llm import llama
from megamm.models.options import ProjectorOptions, VlmOptions
from megamm.models.projector import mlp
from megamm.models.vision import clip
from megamm.weights.keymap import KeyMap

DEFAULTS: dict[str, Any] = {
    # What transformers' LlavaConfig assumes for a field that config.json leaves out.
    "image_token_index": 32000,
    "projector_hidden_act": "gelu",
    "vision_feature_select_strategy": "default",
    "vision_feature_layer": -2,
    "multimodal_projector_bias": True,
    "tie_word_embeddings": False,
}


def read(config: dict[str, Any]) -> VlmOptions:
    """config.json of LlavaForConditionalGeneration -> options."""
    if config.get("model_type") != "llava" or not {"text_config", "vision_config"} <= config.keys():
        raise CheckpointError("config.json is not a llava of transformers: model_type, text_config or vision_config")
    get = {**DEFAULTS, **config}.__getitem__
    for field in ("projector_hidden_act", "multimodal_projector_bias"):
        if get(field) != DEFAULTS[field]:
            raise CheckpointError(f"config.json: {field} {get(field)!r} is not supported, only {DEFAULTS[field]!r}")
    for part, kind, only in (("text", "llama", "llama"), ("vision", "clip_vision_model", "clip_vision_model")):
        found = config[f"{part}_config"].get("model_type", only)
        if found != kind:
            raise CheckpointError(f"config.json: {part}_config.model_type {found!r} is not llava's {kind!r}")
    strategy, layer = get("vision_feature_select_strategy"), get("vision_feature_layer")
    if strategy not in ("default", "full") or not isinstance(layer, int):
        raise CheckpointError(
            f"config.json: vision_feature_select_strategy must be default or full and vision_feature_layer one "
            f"integer, not {strategy!r} and {layer!r}"
        )
    vision = clip.from_hf(config["vision_config"], layer, keep_class_token=strategy == "full")
    llm = llama.from_hf({**config["text_config"], "tie_word_embeddings": _is_tied(config)})
    return VlmOptions(
        family="llava",
        vision=vision,
        projector=ProjectorOptions(kind="mlp2x_gelu", in_size=vision.hidden_size, out_size=llm.hidden_size),
        llm=llm,
        image=clip.IMAGE,
        image_token_id=config.get("image_token_id", get("image_token_index")),
        tokens_per_image=vision.num_features,
        hf=config,
    )


def _is_tied(config: dict[str, Any]) -> bool:
    """The whole model's field counts for transformers; the llm's own, where it is given, must not contradict."""
    tied = config.get("tie_word_embeddings", DEFAULTS["tie_word_embeddings"])
    if config["text_config"].get("tie_word_embeddings", tied) != tied:
        raise CheckpointError("config.json: tie_word_embeddings differs between the model and its text_config")
    return tied


def write(options: VlmOptions) -> dict[str, Any]:
    """Options -> config.json of LlavaForConditionalGeneration."""
    source, vision = options.hf, options.vision
    known = {
        "architectures": source.get("architectures", ["LlavaForConditionalGeneration"]),
        "model_type": "llava",
        "tie_word_embeddings": options.llm.has_tied_embeddings,
        "text_config": llama.to_hf(options.llm, source.get("text_config", {})),
        "vision_config": clip.to_hf(vision, source.get("vision_config", {})),
        "vision_feature_select_strategy": "full" if vision.keep_class_token else "default",
    }
    layer = source.get("vision_feature_layer", DEFAULTS["vision_feature_layer"])
    if layer % (vision.stored_layers + 1) != vision.num_layers:
        layer = vision.num_layers - vision.stored_layers - 1
    known["vision_feature_layer"] = layer
    if "image_token_id" not in source:
        known["image_token_index"] = options.image_token_id
    return overlay(source, known, {**DEFAULTS, "architectures": source.get("architectures")})


def _native(options: VlmOptions, *, llm: dict[str, str], projector: str, vision: str) -> KeyMap:
    return (
        clip.keys(options.vision).renamed(ours="vision.", hf={"": vision})
        + mlp.keys(options.projector).renamed(ours="projector.", hf={"": projector})
        + llama.keys(options.llm).renamed(ours="llm.", hf=llm)
    )


_ON_DISK = {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."}
_IN_MEMORY = {"model.": "model.language_model."}

FAMILY = Family(
    name="llava",
    read=read,
    write=write,
    keys={
        "hf": partial(_native, llm=_ON_DISK, projector="multi_modal_projector.", vision="vision_tower.vision_model."),
        "hf-4.52": partial(
            _native,
            llm=_IN_MEMORY,
            projector="model.multi_modal_projector.",
            vision="model.vision_tower.vision_model.",
        ),
        "hf-5": partial(_native, llm=_ON_DISK, projector="multi_modal_projector.", vision="vision_tower."),
    },
    export_dialect="hf",
    template="v1",
)
