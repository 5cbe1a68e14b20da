"""The spelling of transformers' LlavaForConditionalGeneration: config.json and key names, for a decoder and a tower.

Shared by every family that this class can hold. Tables and options only. Source: transformers 4.36 to 5.23.
"""

from dataclasses import fields, replace
from typing import Any

from megamm.errors import CheckpointError
from megamm.models.family import overlay
from megamm.models.options import ProjectorOptions, VisionOptions, VlmOptions
from megamm.models.parts import Parts, vision_config
from megamm.models.projector import mlp
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
CARRIED = ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype")
"""What goes along from one spelling to the other beside the options."""

_ALIASES = {
    # In memory since 4.52, the head beside the model; 5.x leaves out CLIP's `vision_model` level.
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.vision_tower.vision_model.": "vision_tower.vision_model.",
    "model.vision_tower.": "vision_tower.vision_model.",
    "vision_tower.vision_model.": "vision_tower.vision_model.",
    "vision_tower.": "vision_tower.vision_model.",
}


def is_native(config: dict[str, Any]) -> bool:
    """Whether a config.json is written in this spelling."""
    return config.get("model_type") == "llava" and {"text_config", "vision_config"} <= config.keys()


def read(config: dict[str, Any], tower_config: dict[str, Any] | None, *, family: str, parts: Parts) -> VlmOptions:
    """config.json -> options. A tower's own config.json must not contradict the vision_config."""
    if not is_native(config):
        raise CheckpointError("config.json is not a llava of transformers: model_type, text_config or vision_config")
    get = {**DEFAULTS, **config}.__getitem__
    for field in ("projector_hidden_act", "multimodal_projector_bias"):
        if get(field) != DEFAULTS[field]:
            raise CheckpointError(f"config.json: {field} {get(field)!r} is not supported, only {DEFAULTS[field]!r}")
    strategy, layer = get("vision_feature_select_strategy"), get("vision_feature_layer")
    if strategy not in ("default", "full") or not isinstance(layer, int):
        raise CheckpointError(
            f"config.json: vision_feature_select_strategy must be default or full and vision_feature_layer one "
            f"integer, not {strategy!r} and {layer!r}"
        )
    keep_first_token = strategy == "full"
    tower = parts.vision_options(config, layer, keep_first_token, "config.json: vision_config")
    if tower_config is not None:
        check_same_tower(tower, parts.vision_options(tower_config, layer, keep_first_token))
    text = {**config["text_config"], "tie_word_embeddings": _is_tied(config)}
    # Whatever the llm alone has: the head of this class has no bias.
    decoder = replace(parts.llm_options(text, "config.json: text_config"), has_head_bias=False)
    image_token_id = config.get("image_token_id", get("image_token_index"))
    has_image_token = image_token_id is not None and image_token_id < decoder.vocab_size
    return VlmOptions(
        family=family,
        vision=tower,
        projector=ProjectorOptions(kind="mlp2x_gelu", in_size=tower.hidden_size, out_size=decoder.hidden_size),
        llm=decoder,
        image=parts.vision(tower).IMAGE,
        image_token_id=image_token_id if has_image_token else None,
        tokens_per_image=tower.num_features,
        hf=config,
    )


def _is_tied(config: dict[str, Any]) -> bool:
    """The whole model's field counts for transformers; the llm's own, where it is given, must not contradict."""
    tied = config.get("tie_word_embeddings", DEFAULTS["tie_word_embeddings"])
    if config["text_config"].get("tie_word_embeddings", tied) != tied:
        raise CheckpointError("config.json: tie_word_embeddings differs between the model and its text_config")
    return tied


def check_same_tower(ours: VisionOptions, towers: VisionOptions) -> None:
    """CheckpointError: `towers`, what a tower's own config.json says, is not what the model's says."""
    for field in fields(VisionOptions):
        said, found = getattr(ours, field.name), getattr(towers, field.name)
        if said != found:
            raise CheckpointError(
                f"config.json: vision_config makes the tower's {field.name} {said}, the --tower's config.json {found}; "
                "give the tower that the model was made with"
            )


def write(options: VlmOptions, *, parts: Parts) -> dict[str, Any]:
    """Options -> config.json, written over the one they came from if that was in this spelling."""
    llm, vision = parts.llm(options.llm), parts.vision(options.vision)
    if lacks := _lacks(options):
        raise CheckpointError(f"transformers' llava has no {lacks}; export in the --dialect of the authors' code")
    source = options.hf if is_native(options.hf) else {}
    tower = options.hf.get("vision_config", options.tower_hf or {})
    known: dict[str, Any] = {
        "model_type": "llava",
        "tie_word_embeddings": options.llm.has_tied_embeddings,
        "text_config": llm.to_hf(options.llm, source.get("text_config", {})),
        "vision_config": vision.to_hf(options.vision, vision_config(tower)),
        "vision_feature_select_strategy": "full" if options.vision.keep_first_token else "default",
        "vision_feature_layer": feature_layer(options.vision, source.get("vision_feature_layer", -2)),
    }
    if "image_token_id" not in source:
        # transformers wants an integer also where there is no such token: the first one behind the vocabulary.
        none = {**DEFAULTS, **source}["image_token_index"] if source else options.llm.vocab_size
        known["image_token_index"] = none if options.image_token_id is None else options.image_token_id
    if not source:
        carried = {key: options.hf[key] for key in CARRIED if key in options.hf}
        known["text_config"] |= carried
        known |= carried
        known |= {"architectures": ["LlavaForConditionalGeneration"], "image_seq_length": options.tokens_per_image}
    return overlay(source, known, DEFAULTS)


def _lacks(options: VlmOptions) -> str | None:
    """What this model has and transformers' class has not; None: it can hold the model."""
    if options.projector.kind != "mlp2x_gelu":
        return f"projector of kind {options.projector.kind!r}"
    return "bias on the head" if options.llm.has_head_bias else None


def feature_layer(vision: VisionOptions, said: int) -> int:
    """`said` where it means the block whose output is used, else that block counted from the end."""
    if said % (vision.stored_layers + 1) == vision.num_layers:
        return said
    return vision.num_layers - vision.stored_layers - 1


def compose(llm_hf: dict[str, Any], tower_hf: dict[str, Any], *, parts: Parts) -> dict[str, Any]:
    """config.json of a model made of a plain llm and a plain tower, in LLaVA-1.5's way. The vocabulary stays as the llm
    has it, so no id stands for a visual token: `image_token_index` is the first one behind it."""
    llm = parts.llm_options(llm_hf, "the llm's config.json")
    tower = parts.vision_options(tower_hf, -2, keep_first_token=False)
    tower = replace(tower, keep_first_token=not tower.has_class_token)
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": llm.vocab_size,
        "image_seq_length": tower.num_features,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "full" if tower.keep_first_token else "default",
        "text_config": llm_hf,
        "vision_config": {"model_type": tower.model_type, **vision_config(tower_hf)},
    } | {key: llm_hf[key] for key in ("dtype", "torch_dtype", "tie_word_embeddings") if key in llm_hf}


def keys(options: VlmOptions, *, parts: Parts) -> KeyMap:
    """The table in the spelling of the published files (transformers up to 4.51), which every later version reads;
    whatever prefixes transformers has since put in or left out are accepted. No rows for what it cannot hold."""
    if _lacks(options):
        return KeyMap(())
    table = (
        parts.vision(options.vision).keys(options.vision).renamed(ours="vision.", hf={"": "vision_tower.vision_model."})
        + mlp.keys(options.projector).renamed(ours="projector.", hf={"": "multi_modal_projector."})
        + parts.llm(options.llm).keys(options.llm).renamed(ours="llm.", hf={"": "language_model."})
    )
    return table.accepting(_ALIASES)
