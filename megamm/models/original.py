"""The spelling of LLaVA's own code: one flat config.json of the decoder's fields and `mm_*` fields, and its key names.

Shared by every family that descends from that code, whatever its decoder and tower. The sizes of the tower stand in the
tower's own config.json. Tables and options only. Source: LLaVA's llava/model.
"""

from typing import Any

from megamm.errors import CheckpointError
from megamm.models.family import overlay
from megamm.models.native import CARRIED, feature_layer
from megamm.models.options import ProjectorOptions, VlmOptions
from megamm.models.parts import LlmPart, VisionPart, vision_config
from megamm.models.projector import mlp
from megamm.weights.keymap import KeyMap

DEFAULTS: dict[str, Any] = {
    # What the authors' code assumes for a field that config.json leaves out, but for the two flags: it takes a missing
    # mm_use_im_patch_token for true and adds a token, so both are always written.
    "mm_projector_type": "linear",
    "mm_vision_select_feature": "patch",
    "mm_patch_merge_type": "flat",
    "image_aspect_ratio": "square",
}
_FLAGS = ("mm_use_im_start_end", "mm_use_im_patch_token")
_FEATURES = {"patch": False, "cls_patch": True}
_PROJECTORS = {
    "linear": {"linear_1.": "model.mm_projector."},
    "mlp2x_gelu": {"linear_1.": "model.mm_projector.0.", "linear_2.": "model.mm_projector.2."},
}
_LEGAL: dict[str, tuple[Any, ...]] = {
    "mm_projector_type": tuple(_PROJECTORS),
    "mm_vision_select_feature": tuple(_FEATURES),
    "image_aspect_ratio": ("square", "pad", None),  # anyres, and every other merge type: LLaVA-NeXT
    "mm_patch_merge_type": ("flat",),
    **dict.fromkeys(_FLAGS, (False,)),
}


def is_original(config: dict[str, Any]) -> bool:
    """Whether a config.json is written in this spelling."""
    return "mm_vision_tower" in config


def read(
    config: dict[str, Any],
    tower_config: dict[str, Any] | None,
    *,
    family: str,
    model_types: tuple[str, ...],
    llm: LlmPart,
    vision: VisionPart,
) -> VlmOptions:
    """config.json, and that of the tower it names -> options."""
    if config.get("model_type") not in model_types:
        known = ", ".join(model_types)
        raise CheckpointError(f"config.json: model_type {config.get('model_type')!r} is none of {known}")
    fields: dict[str, Any] = {**DEFAULTS, **dict.fromkeys(_FLAGS, False), **config}
    for field, legal in _LEGAL.items():
        if fields[field] not in legal:
            raise CheckpointError(
                f"config.json: {field} {fields[field]!r} is not supported, only {', '.join(map(str, legal))}"
            )
    layer, kind = fields.get("mm_vision_select_layer"), fields["mm_projector_type"]
    keep_class_token = _FEATURES[fields["mm_vision_select_feature"]]
    if not isinstance(layer, int):
        raise CheckpointError(f"config.json: mm_vision_select_layer must be an integer, not {layer!r}")
    if tower_config is None:
        raise CheckpointError(
            f"config.json names its vision tower ({fields['mm_vision_tower']}) but not its sizes: import it with "
            "--tower, a directory that holds the tower's config.json"
        )
    tower = vision.from_hf(vision_config(tower_config, vision), layer, keep_class_token)
    if fields.get("mm_hidden_size", tower.hidden_size) != tower.hidden_size:
        raise CheckpointError(
            f"config.json: mm_hidden_size is {fields['mm_hidden_size']} and the --tower's hidden_size is "
            f"{tower.hidden_size}; give the tower that the model was made with"
        )
    decoder = llm.from_hf(config)
    return VlmOptions(
        family=family,
        vision=tower,
        projector=ProjectorOptions(kind=kind, in_size=tower.hidden_size, out_size=decoder.hidden_size),
        llm=decoder,
        image=vision.IMAGE,
        image_token_id=None,
        tokens_per_image=tower.num_features,
        hf=config,
        tower_hf=tower_config,
    )


def write(
    options: VlmOptions, *, model_type: str, architecture: str, llm: LlmPart, vision: VisionPart
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options -> config.json and the tower's, written over those they came from if these were in this spelling.

    A tower that was never published apart is named `vision_tower`, the folder of an export that describes it.
    """
    source = options.hf if is_original(options.hf) else {}
    known = {
        "model_type": source.get("model_type", model_type),
        "mm_vision_tower": source.get("mm_vision_tower", "vision_tower"),
        "mm_hidden_size": options.vision.hidden_size,
        "mm_projector_type": options.projector.kind,
        "mm_vision_select_layer": feature_layer(options.vision, source.get("mm_vision_select_layer", -2)),
        "mm_vision_select_feature": next(k for k, keep in _FEATURES.items() if keep == options.vision.keep_class_token),
    }
    defaults = {**DEFAULTS, "mm_hidden_size": options.vision.hidden_size}
    out = overlay(llm.to_hf(options.llm, source), known, defaults if source else {}) | dict.fromkeys(_FLAGS, False)
    if options.tower_hf is not None and source:
        return out, options.tower_hf
    tower = vision.to_hf(options.vision, options.hf.get("vision_config", {}))
    text = options.hf.get("text_config", {})
    carried = {key: part[key] for part in (text, options.hf) for key in CARRIED if key in part}
    fresh = {"image_aspect_ratio": "pad", "mm_patch_merge_type": "flat", "use_mm_proj": True}
    return out | carried | fresh | {"architectures": [architecture]}, tower


def keys(options: VlmOptions, *, llm: LlmPart, vision: VisionPart) -> KeyMap:
    """The table, the tower's tensors in the checkpoint; where they are not, they come from the tower's directory."""
    tower = {"": "model.vision_tower.vision_tower.vision_model."}
    return (
        vision.keys(options.vision).renamed(ours="vision.", hf=tower)
        + mlp.keys(options.projector).renamed(ours="projector.", hf=_PROJECTORS[options.projector.kind])
        + llm.keys(options.llm).renamed(ours="llm.")
    )
