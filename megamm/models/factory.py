"""The spelling of TinyLLaVA_Factory: one config.json with a config of each part inside, and its key names.

It can hold any decoder, tower and connector that its code registers, and says for every tower whether the first feature
is dropped. Tables and options only. Source: arXiv 2405.11788 and its code.
"""

from dataclasses import fields
from typing import Any

from megamm.errors import CheckpointError
from megamm.models.family import overlay
from megamm.models.native import CARRIED, feature_layer
from megamm.models.options import VlmOptions
from megamm.models.parts import Parts, vision_config
from megamm.models.projector import published
from megamm.weights.keymap import KeyMap

MODEL_TYPE = "tinyllava"
DEFAULTS: dict[str, Any] = {
    # What the authors' code assumes for a field that config.json leaves out.
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "patch",
    **published.DEFAULTS,
}
PROJECTORS = ("linear", "mlpNx_gelu", "perceiver")
_FEATURES = {"patch": False, "cls_patch": True}
_LLMS = {
    "llama": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "phi": "microsoft/phi-2",
    "qwen2": "Qwen/Qwen2-0.5B",
    "stablelm": "stabilityai/stablelm-2-zephyr-1_6b",
}
_TOWERS = {
    "clip_vision_model": "openai/clip-vit-large-patch14-336",
    "siglip_vision_model": "google/siglip-so400m-patch14-384",
}
"""The authors' code picks a part's class by words in these fields, so a config.json that names none gets one."""


def _check_registered(llm: str, tower: str) -> None:
    for found, known in ((llm, _LLMS), (tower, _TOWERS)):
        if found not in known:
            raise CheckpointError(
                f"TinyLLaVA_Factory has no {found}, only {', '.join(known)}; use another family, or export in another "
                "--dialect"
            )


def is_factory(config: dict[str, Any]) -> bool:
    """Whether a config.json is written in this spelling."""
    return config.get("model_type") == MODEL_TYPE and {"text_config", "vision_config"} <= config.keys()


def read(config: dict[str, Any], tower_config: dict[str, Any] | None, *, family: str, parts: Parts) -> VlmOptions:
    """config.json -> options. A tower's own config.json is not needed: every checkpoint holds its tower."""
    get = {**DEFAULTS, **config}.__getitem__
    strategy, layer = get("vision_feature_select_strategy"), get("vision_feature_layer")
    if strategy not in _FEATURES or not isinstance(layer, int):
        raise CheckpointError(
            f"config.json: vision_feature_select_strategy must be one of {', '.join(_FEATURES)} and "
            f"vision_feature_layer one integer, not {strategy!r} and {layer!r}"
        )
    decoder = parts.llm_options(config["text_config"], "config.json: text_config")
    tower = parts.vision_options(config, layer, _FEATURES[strategy], "config.json: vision_config")
    for name, said, found in (
        ("hidden_size", config.get("hidden_size"), decoder.hidden_size),
        ("vision_hidden_size", config.get("vision_hidden_size"), tower.hidden_size),
    ):
        if said not in (None, found):
            raise CheckpointError(f"config.json: {name} is {said} and that of the part's own config {found}")
    sizes = dict(in_size=tower.hidden_size, out_size=decoder.hidden_size)
    projector = published.read(config, "connector_type", "mlp2x_gelu", PROJECTORS, **sizes)
    return VlmOptions(
        family=family,
        vision=tower,
        projector=projector,
        llm=decoder,
        image=parts.vision(tower).IMAGE,
        image_token_id=None,
        tokens_per_image=projector.num_queries or tower.num_features,
        max_tokens=config.get("tokenizer_model_max_length"),
        hf=config,
    )


def write(options: VlmOptions, *, parts: Parts) -> dict[str, Any]:
    """Options -> config.json, written over the one they came from if that was in this spelling.

    CheckpointError: a decoder or tower that the authors' code has no class for, or whose class computes otherwise."""
    llm, tower, projector = options.llm, options.vision, options.projector
    _check_registered(llm.model_type, tower.model_type)
    source = options.hf if is_factory(options.hf) else {}
    text = source.get("text_config", {})
    seen = options.hf.get("vision_config") or vision_config(options.tower_hf or {})
    known: dict[str, Any] = {
        "model_type": MODEL_TYPE,
        "text_config": parts.llm(llm).to_hf(llm, text),
        "vision_config": parts.vision(tower).to_hf(tower, seen),
        "hidden_size": llm.hidden_size,
        "vocab_size": llm.vocab_size,
        "vision_hidden_size": tower.hidden_size,
        "vision_feature_layer": feature_layer(tower, source.get("vision_feature_layer", -2)),
        "vision_feature_select_strategy": "cls_patch" if tower.keep_first_token else "patch",
        **published.write(projector, "connector_type", PROJECTORS),
    }
    theirs = parts.llm_options(known["text_config"])
    if differ := [f.name for f in fields(llm) if getattr(llm, f.name) != getattr(theirs, f.name)]:
        raise CheckpointError(
            f"TinyLLaVA_Factory's {llm.model_type} has {differ[0]} {getattr(theirs, differ[0])}, this model "
            f"{getattr(llm, differ[0])}; export in another --dialect"
        )
    same = {key: known[key] for key in ("hidden_size", "vocab_size", "vision_hidden_size")}
    if source:
        return overlay(source, known, DEFAULTS | same | {"connector_type": "mlp2x_gelu"})
    carried = {key: options.hf[key] for key in CARRIED if key in options.hf}
    known["text_config"] |= carried
    fresh = names(llm.model_type, tower.model_type, options.max_tokens or llm.max_positions)
    return known | carried | fresh | {key: options.hf[key] for key in ("image_aspect_ratio",) if options.hf.get(key)}


def names(llm: str, tower: str, max_tokens: int) -> dict[str, Any]:
    """What the authors' code reads beside the sizes."""
    return {
        "architectures": ["TinyLlavaForConditionalGeneration"],
        "llm_model_name_or_path": _LLMS[llm],
        "tokenizer_name_or_path": _LLMS[llm],
        "vision_model_name_or_path": _TOWERS[tower],
        "vision_model_name_or_path2": "",
        "image_token_index": -200,
        "ignore_index": -100,
        "image_aspect_ratio": "square",
        "tokenizer_model_max_length": max_tokens,
        "tokenizer_padding_side": "right",
        "tokenizer_use_fast": False,
    }


def compose(llm_hf: dict[str, Any], tower_hf: dict[str, Any], *, parts: Parts) -> dict[str, Any]:
    """config.json of a model made of a plain llm and a plain tower, as the authors' scripts make it: mlp2x_gelu, and
    the first feature of whatever tower dropped."""
    llm = parts.llm_options(llm_hf, "the llm's config.json")
    tower = parts.vision_options(tower_hf, -2, keep_first_token=False)
    _check_registered(llm.model_type, tower.model_type)
    return {
        "model_type": MODEL_TYPE,
        "connector_type": "mlp2x_gelu",
        "hidden_size": llm.hidden_size,
        "vocab_size": llm.vocab_size,
        "vision_hidden_size": tower.hidden_size,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "patch",
        "text_config": {"model_type": llm.model_type, **llm_hf},
        "vision_config": {"model_type": tower.model_type, **vision_config(tower_hf)},
        **names(llm.model_type, tower.model_type, llm.max_positions),
    } | {key: llm_hf[key] for key in CARRIED if key in llm_hf}


def keys(options: VlmOptions, *, parts: Parts) -> KeyMap:
    """The table, all parts in one checkpoint."""
    tower = {"": "vision_tower._vision_tower.vision_model."}
    return (
        parts.vision(options.vision).keys(options.vision).renamed(ours="vision.", hf=tower)
        + published.keys(options.projector, "connector._connector.")
        + parts.llm(options.llm).keys(options.llm).renamed(ours="llm.", hf={"": "language_model."})
    )
