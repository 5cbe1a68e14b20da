"""The spelling of LLaVA's own code: one flat config.json of the decoder's fields and `mm_*` fields, and its key names.

Shared by every family that descends from that code, whatever its decoder and tower. The sizes of the tower stand in the
tower's own config.json. Tables and options only. Source: LLaVA's llava/model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megamm.errors import CheckpointError
from megamm.models.family import overlay
from megamm.models.native import CARRIED, feature_layer
from megamm.models.options import LlmOptions, VlmOptions
from megamm.models.parts import LlmPart, Parts
from megamm.models.projector import published
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
_LEGAL: dict[str, tuple[Any, ...]] = {
    "mm_vision_select_feature": tuple(_FEATURES),
    "image_aspect_ratio": ("square", "pad", None),  # anyres, and every other merge type: LLaVA-NeXT
    "mm_patch_merge_type": ("flat",),
    **dict.fromkeys(_FLAGS, (False,)),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Class:
    """One model class of the authors' code."""

    model_type: str
    architecture: str
    """Its name in the code."""
    llm: LlmPart
    always: dict[str, Any] = field(default_factory=dict)
    """Fields of LlmOptions that it sets whatever config.json says."""

    def holds(self, llm: LlmOptions) -> bool:
        """Whether it computes what these options say."""
        return llm.model_type == self.llm.MODEL_TYPE and all(getattr(llm, k) == v for k, v in self.always.items())


def is_original(config: dict[str, Any]) -> bool:
    """Whether a config.json is written in this spelling."""
    return "mm_vision_tower" in config


def read(
    config: dict[str, Any],
    tower_config: dict[str, Any] | None,
    *,
    family: str,
    parts: Parts,
    classes: Sequence[Class],
) -> VlmOptions:
    """config.json, and that of the tower it names -> options. Of a tower without a class token every patch is kept,
    whatever mm_vision_select_feature says: so does the code of TinyLLaVA and Imp."""
    chosen = next((c for c in classes if c.model_type == config.get("model_type")), None)
    if chosen is None:
        known = ", ".join(dict.fromkeys(c.model_type for c in classes))
        raise CheckpointError(f"config.json: model_type {config.get('model_type')!r} is none of {known}")
    fields: dict[str, Any] = {**DEFAULTS, **dict.fromkeys(_FLAGS, False), **config}
    for name, legal in _LEGAL.items():
        if fields[name] not in legal:
            raise CheckpointError(
                f"config.json: {name} {fields[name]!r} is not supported, only {', '.join(map(str, legal))}"
            )
    layer = fields.get("mm_vision_select_layer")
    if not isinstance(layer, int):
        raise CheckpointError(f"config.json: mm_vision_select_layer must be an integer, not {layer!r}")
    if tower_config is None:
        raise CheckpointError(
            f"config.json names its vision tower ({fields['mm_vision_tower']}) but not its sizes: import it with "
            "--tower, a directory that holds the tower's config.json"
        )
    tower = parts.vision_options(tower_config, layer, _FEATURES[fields["mm_vision_select_feature"]])
    tower = tower if tower.has_class_token else replace(tower, keep_first_token=True)
    if fields.get("mm_hidden_size", tower.hidden_size) != tower.hidden_size:
        raise CheckpointError(
            f"config.json: mm_hidden_size is {fields['mm_hidden_size']} and the --tower's hidden_size is "
            f"{tower.hidden_size}; give the tower that the model was made with"
        )
    decoder = replace(chosen.llm.from_hf(config), **chosen.always)
    sizes = dict(in_size=tower.hidden_size, out_size=decoder.hidden_size)
    projector = published.read(config, "mm_projector_type", DEFAULTS["mm_projector_type"], parts.projectors, **sizes)
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
        tower_hf=tower_config,
    )


def write(options: VlmOptions, *, parts: Parts, classes: Sequence[Class]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options -> config.json and the tower's, written over those they came from if these were in this spelling.

    A tower that was never published apart is named `vision_tower`, the folder of an export that describes it.
    CheckpointError: a model that no class of the authors' code computes.
    """
    source = options.hf if is_original(options.hf) else {}
    chosen = _class(options, source, classes)
    known = {
        "model_type": chosen.model_type,
        "mm_vision_tower": source.get("mm_vision_tower", "vision_tower"),
        "mm_hidden_size": options.vision.hidden_size,
        **published.write(options.projector, "mm_projector_type", parts.projectors),
        "mm_vision_select_layer": feature_layer(options.vision, source.get("mm_vision_select_layer", -2)),
        "mm_vision_select_feature": _feature(options, source),
    }
    defaults = {**DEFAULTS, **published.DEFAULTS, "mm_hidden_size": options.vision.hidden_size}
    out = overlay(chosen.llm.to_hf(options.llm, source), known, defaults if source else {}) | dict.fromkeys(
        _FLAGS, False
    )
    if options.tower_hf is not None and source:
        return out, options.tower_hf
    tower = parts.vision(options.vision).to_hf(options.vision, options.hf.get("vision_config", {}))
    text = options.hf.get("text_config", {})
    carried = {key: part[key] for part in (text, options.hf) for key in CARRIED if key in part}
    fresh = {
        "image_aspect_ratio": options.hf.get("image_aspect_ratio") or "pad",
        "mm_patch_merge_type": "flat",
        "use_mm_proj": True,
    }
    if options.max_tokens is not None:
        fresh["tokenizer_model_max_length"] = options.max_tokens
    return out | carried | fresh | {"architectures": [chosen.architecture]}, tower


def _class(options: VlmOptions, source: dict[str, Any], classes: Sequence[Class]) -> Class:
    """The class that computes this model; the one it came from, if it came from one."""
    able = [c for c in classes if c.holds(options.llm)]
    if not able:
        known = ", ".join(
            " ".join([c.llm.MODEL_TYPE, *(f"with {k} {v}" for k, v in c.always.items())]) for c in classes
        )
        raise CheckpointError(
            f"the authors' code has no class for this llm ({options.llm.model_type}), only for: {known}; export in "
            "another --dialect"
        )
    return next((c for c in able if c.model_type == source.get("model_type")), able[0])


def _feature(options: VlmOptions, source: dict[str, Any]) -> str:
    """mm_vision_select_feature; what is said makes no difference to a tower without a class token."""
    vision = options.vision
    if vision.has_class_token:
        return "cls_patch" if vision.keep_first_token else "patch"
    if not vision.keep_first_token:
        raise CheckpointError(
            f"the authors' code gives the projector all {vision.num_positions} features of this tower, and this model "
            f"takes {vision.num_features}: its first patch is dropped; export in another --dialect"
        )
    return source.get("mm_vision_select_feature", DEFAULTS["mm_vision_select_feature"])


def keys(options: VlmOptions, *, parts: Parts) -> KeyMap:
    """The table, the tower's tensors in the checkpoint; where they are not, they come from the tower's directory."""
    tower = {"": "model.vision_tower.vision_tower.vision_model."}
    return (
        parts.vision(options.vision).keys(options.vision).renamed(ours="vision.", hf=tower)
        + published.keys(options.projector, "model.mm_projector.")
        + parts.llm(options.llm).keys(options.llm).renamed(ours="llm.")
    )
