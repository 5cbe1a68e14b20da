"""mPLUG-Owl3: SigLIP, a linear or an MLP, Qwen2 whose hyper layers read the visual tokens beside the text.

Two generations are published under one `model_type`: of July 2024 (240728, and the small ones of 241014) with gated
hyper layers and a linear projector, of November 2024 (241101) with a joint softmax and an MLP. Source: arXiv 2408.04840
and the authors' released code.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from megamm.errors import CheckpointError
from megamm.models.family import Family, overlay
from megamm.models.llm import qwen2
from megamm.models.options import HyperOptions, ProjectorOptions, VisionOptions, VlmOptions
from megamm.models.projector import mlp
from megamm.models.vision import siglip
from megamm.weights.keymap import KeyMap, Row

MODEL_TYPE = "mplugowl3"
GENERATION = "megamm_generation"
"""Field that `complete` adds to a config.json that would be taken for the other generation. Never exported."""
DEFAULTS: dict[str, Any] = {
    # What the authors' configuration class assumes for a field that config.json leaves out.
    **qwen2.DEFAULTS,
    "hyper_layers": [1, 9, 17, 25],
}
_KINDS = {"240728": "gated", "241101": "joint"}
_PROJECTORS = {"240728": "linear", "241101": "mlp2x_gelu"}
_PROJECTOR_NAMES = {
    "linear": {"linear_1.": "vision2text_model."},
    "mlp2x_gelu": {"linear_1.": "vision2text_model.0.", "linear_2.": "vision2text_model.2."},
}
_CODE = {
    # What names the authors' classes in a config.json that none of theirs was read for.
    "architectures": ["mPLUGOwl3Model"],
    "auto_map": {
        "AutoConfig": "configuration_mplugowl3.mPLUGOwl3Config",
        "AutoModel": "modeling_mplugowl3.mPLUGOwl3Model",
        "AutoModelForCausalLM": "modeling_mplugowl3.mPLUGOwl3Model",
    },
}
_FEATURE_LAYER = -2


def generation(config: dict[str, Any]) -> str:
    """`240728` or `241101`: as `complete` noted it, else by the picture size, 378 since November 2024."""
    return config.get(GENERATION) or ("241101" if config["vision_config"].get("image_size") == 378 else "240728")


def complete(config: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """config.json with the generation that the key names show, where it alone would be taken for the other one."""
    if not isinstance(config.get("vision_config"), dict):
        return config
    names = set(names)
    has_gate = any(name.endswith("self_attn.gate_proj.0.weight") for name in names)
    shown = "240728" if has_gate else "241101" if "vision2text_model.0.weight" in names else generation(config)
    return config if shown == generation(config) else config | {GENERATION: shown}


def read(config: dict[str, Any], tower_config: dict[str, Any] | None = None) -> VlmOptions:
    """config.json -> options. A tower's own config.json must not contradict the vision_config."""
    if config.get("model_type") != MODEL_TYPE or not isinstance(config.get("vision_config"), dict):
        raise CheckpointError(f"config.json is not of a {MODEL_TYPE}: model_type or vision_config")
    decoder = qwen2.from_hf(config)
    tower = _tower(config["vision_config"], "config.json: vision_config")
    if tower_config is not None:
        _check_same(tower, _tower(tower_config.get("vision_config", tower_config), "the tower's config.json"))
    layers = config.get("hyper_layers", DEFAULTS["hyper_layers"])
    if not layers or list(layers) != sorted(set(layers)) or not 1 <= layers[0] <= layers[-1] <= decoder.num_layers:
        raise CheckpointError(
            f"config.json: hyper_layers {layers} must rise and lie in 1 to num_hidden_layers ({decoder.num_layers})"
        )
    which = generation(config)
    if which not in _KINDS:
        raise CheckpointError(f"config.json: {GENERATION} {which!r} is none of {', '.join(_KINDS)}")
    hyper = HyperOptions(
        layers=tuple(layer - 1 for layer in layers),
        kind=_KINDS[which],  # type: ignore[arg-type]
        tokens_per_image=tower.num_features,
    )
    return VlmOptions(
        family="mplug_owl3",
        vision=tower,
        projector=ProjectorOptions(
            kind=_PROJECTORS[which],
            in_size=tower.hidden_size,
            out_size=decoder.hidden_size,
        ),
        llm=replace(decoder, hyper=hyper),
        image=siglip.IMAGE,
        image_token_id=None,
        tokens_per_image=tower.num_features,
        hf=config,
    )


def _tower(config: dict[str, Any], where: str) -> VisionOptions:
    if (found := config.get("model_type", siglip.MODEL_TYPE)) != siglip.MODEL_TYPE:
        raise CheckpointError(f"{where}: model_type {found!r} is not {siglip.MODEL_TYPE!r}, the tower of this family")
    return siglip.from_hf(config, _FEATURE_LAYER, True)


def _check_same(ours: VisionOptions, towers: VisionOptions) -> None:
    """378 and 384 pixels are the same 27 x 27 patches of 14: the tower of one serves the other."""
    if ours.num_patches != towers.num_patches or replace(towers, image_size=ours.image_size) != ours:
        raise CheckpointError(
            "config.json: vision_config describes another tower than the --tower's config.json; give the tower "
            "that the model was made with"
        )


def write(options: VlmOptions, dialect: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Options -> config.json, written over the one they came from."""
    assert options.llm.hyper is not None
    source = {key: value for key, value in options.hf.items() if key != GENERATION}
    known = {
        "model_type": MODEL_TYPE,
        "hyper_layers": [layer + 1 for layer in options.llm.hyper.layers],
        "vision_config": siglip.to_hf(options.vision, source.get("vision_config", {})),
    }
    return overlay(qwen2.to_hf(options.llm, source), known, DEFAULTS), None


def compose(llm_config: dict[str, Any], tower_config: dict[str, Any]) -> dict[str, Any]:
    """config.json of a Qwen2 and of a SigLIP -> that of a model of both, of the generation that the picture size says;
    every eighth layer from the first on is a hyper layer, as in 7B-240728. Another choice needs a config.json."""
    if (found := llm_config.get("model_type", qwen2.MODEL_TYPE)) != qwen2.MODEL_TYPE:
        raise CheckpointError(f"config.json: model_type {found!r} is not {qwen2.MODEL_TYPE!r}, the llm of this family")
    decoder = qwen2.from_hf(llm_config)
    tower = _tower(tower_config.get("vision_config", tower_config), "the tower's config.json")
    return {
        **qwen2.to_hf(decoder, llm_config),
        **_CODE,
        "model_type": MODEL_TYPE,
        "hyper_layers": list(range(1, decoder.num_layers + 1, 8)),
        "vision_config": siglip.to_hf(tower, {}),
    }


def keys(options: VlmOptions) -> KeyMap:
    """The table; `v_kv_proj` has its rows as megatron-core has them, per group the key's, then the value's."""
    llm, hyper = options.llm, options.llm.hyper
    assert hyper is not None
    kv, d = 2 * llm.num_groups * llm.head_dim, llm.head_dim
    rows = []
    for layer in hyper.layers:
        ours, theirs = f"decoder.layers.{layer}.self_attention.", f"model.layers.{layer}.self_attn."
        rows += [
            Row(f"{ours}linear_image_kv.weight", (f"{theirs}v_kv_proj.weight",), (kv, llm.hidden_size), tp="col"),
            Row(f"{ours}linear_image_kv.bias", (f"{theirs}v_kv_proj.bias",), (kv,), tp="col"),
        ]
        if hyper.kind == "gated":
            rows += [
                Row(f"{ours}gate.weight", (f"{theirs}gate_proj.0.weight",), (d, d)),
                Row(f"{ours}gate.bias", (f"{theirs}gate_proj.0.bias",), (d,)),
            ]
    return (
        siglip.keys(options.vision).renamed(ours="vision.", hf={"": "vision_model."})
        + mlp.keys(options.projector).renamed(ours="projector.", hf=_PROJECTOR_NAMES[options.projector.kind])
        + (qwen2.keys(llm) + KeyMap(rows)).renamed(ours="llm.", hf={"": "language_model."})
    )


FAMILY = Family(
    name="mplug_owl3",
    read=read,
    write=write,
    complete=complete,
    compose=compose,
    keys={"original": keys},
    export_dialect="original",
    drawn=(
        "projector.",
        "llm.decoder.layers.{i}.self_attention.linear_image_kv.",
        "llm.decoder.layers.{i}.self_attention.gate.",
    ),
    template="mplug_owl3",
    pretrain_template="mplug_owl3_plain",
    placeholder="<|image|>",
)
