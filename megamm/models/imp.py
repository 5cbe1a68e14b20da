"""Imp: SigLIP, a two-layer MLP, Phi-2, Qwen1.5 or Phi-3; visual tokens replace the marker. Source: arXiv 2405.12107.

Published in the spelling of LLaVA's own code, with the tower's sizes inside config.json; the first revisions of
imp-v1-3b in that of the first Phi-2 (`legacy`).
"""

from dataclasses import replace
from typing import Any

from megamm.errors import CheckpointError
from megamm.models import llava_line, original
from megamm.models.llm import phi2, phi2_legacy, phi3, qwen2
from megamm.models.native import check_same_tower
from megamm.models.options import VlmOptions
from megamm.models.original import Class
from megamm.models.parts import Parts
from megamm.models.projector import published
from megamm.models.vision import siglip
from megamm.weights.keymap import KeyMap

_PARTS = Parts(llms=(phi2, qwen2, phi3), visions=(siglip,), projectors=("mlpNx_gelu",))
_LINE = llava_line.family(
    name="imp",
    parts=_PARTS,
    template="phi2",
    classes=(
        Class(model_type="imp", architecture="ImpForCausalLM", llm=phi2, always={"has_head_bias": True}),
        Class(model_type="imp_qwen2", architecture="ImpQwen2ForCausalLM", llm=qwen2),
        Class(model_type="imp_phi3", architecture="ImpPhi3ForCausalLM", llm=phi3),
    ),
)
_TOWER = "vision_tower_config"
_RELEASED = {"phi": ("square", 3072), "qwen2": ("square", 2560), "phi3": ("pad", 2560)}
"""Per decoder the image_aspect_ratio and tokenizer_model_max_length of the released config.json; Phi-2 was made for
2048 positions, and the authors go beyond."""


def read(config: dict[str, Any], tower_config: dict[str, Any] | None = None) -> VlmOptions:
    """config.json in any spelling -> options. A tower's own config.json must not contradict the one inside."""
    options = _LINE.read(phi2_legacy.current(config), config.get(_TOWER, tower_config))
    if _TOWER in config and tower_config is not None:
        tower = _PARTS.vision_options(
            tower_config, options.vision.num_layers, keep_first_token=options.vision.keep_first_token
        )
        check_same_tower(options.vision, tower)
    return replace(options, image_token_id=options.image_token_id or _image_token_id(config, options), hf=config)


def _image_token_id(config: dict[str, Any], options: VlmOptions) -> int | None:
    """A row of the vocabulary that no text has: the released configurations name one, for inference only."""
    named = config.get("image_token_index")
    return named if named is not None and named < options.llm.vocab_size else None


def write(options: VlmOptions, dialect: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Options -> config.json, and the tower's where it does not stand inside."""
    if dialect == "hf":
        return _LINE.write(options, dialect)
    source = options.hf
    if dialect == "legacy" and options.llm.model_type != phi2.MODEL_TYPE:
        raise CheckpointError(
            f"the first spelling of Imp has no llm but Phi-2, and this one is {options.llm.model_type}; export with "
            "--dialect original"
        )
    config, tower = _LINE.write(replace(options, hf=phi2_legacy.current(source)), "original")
    if _TOWER in source or not original.is_original(source):
        config, tower = {**config, _TOWER: source.get(_TOWER, tower)}, None
    return (phi2_legacy.legacy(config, source) if dialect == "legacy" else config), tower


def compose(llm_hf: dict[str, Any], tower_hf: dict[str, Any]) -> dict[str, Any]:
    """config.json of a model of a plain llm and a plain tower, as Imp publishes it: transformers' class has no bias on
    its head, and Phi-2 has one."""
    start = _LINE.read(_LINE.compose(llm_hf, tower_hf), None)
    llm = _PARTS.llm_options(llm_hf, "the llm's config.json")
    config, _ = write(replace(start, llm=llm), "original")
    aspect, max_tokens = _RELEASED[llm.model_type]
    return {**config, "image_aspect_ratio": aspect, "tokenizer_model_max_length": max_tokens}


def _legacy_keys(options: VlmOptions) -> KeyMap:
    """No rows where the llm is none that was ever spelt so."""
    if options.llm.model_type != phi2.MODEL_TYPE:
        return KeyMap(())
    return (
        siglip.keys(options.vision).renamed(
            ours="vision.", hf={"": "transformer.vision_tower.vision_tower.vision_model."}
        )
        + published.keys(options.projector, "transformer.mm_projector.")
        + phi2_legacy.keys(options.llm).renamed(ours="llm.")
    )


FAMILY = replace(
    _LINE,
    read=read,
    write=write,
    compose=compose,
    keys={"original": _LINE.keys["original"], "legacy": _legacy_keys, "hf": _LINE.keys["hf"]},
    export_dialect="original",
)
