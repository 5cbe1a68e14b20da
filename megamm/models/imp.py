"""Imp: SigLIP, a two-layer MLP, Phi-2, Qwen1.5 or Phi-3; visual tokens replace the marker. Source: arXiv 2405.12107.

Published in the spelling of LLaVA's own code, with the tower's sizes inside config.json (`original`); the first
revisions of imp-v1-3b in that of the first Phi-2 (`legacy`).
"""

from dataclasses import replace
from functools import partial
from typing import Any

from megamm.errors import CheckpointError
from megamm.models import native, original
from megamm.models.llava_line import Spelling, family
from megamm.models.llm import phi2, phi2_legacy, phi3, qwen2
from megamm.models.options import VlmOptions
from megamm.models.original import Class
from megamm.models.parts import Parts
from megamm.models.projector import published
from megamm.models.vision import siglip
from megamm.weights.keymap import KeyMap

_Json = dict[str, Any]

PARTS = Parts(llms=(phi2, qwen2, phi3), visions=(siglip,), projectors=("mlpNx_gelu",))
_CLASSES = (
    Class(model_type="imp", architecture="ImpForCausalLM", llm=phi2, always={"has_head_bias": True}),
    Class(model_type="imp_qwen2", architecture="ImpQwen2ForCausalLM", llm=qwen2),
    Class(model_type="imp_phi3", architecture="ImpPhi3ForCausalLM", llm=phi3),
)
_RELEASED = {"phi": ("square", 3072), "qwen2": ("square", 2560), "phi3": ("pad", 2560)}
"""Per decoder the image_aspect_ratio and tokenizer_model_max_length of the released config.json; Phi-2 was made for
2048 positions, and the authors go beyond."""
_TOWER = "vision_tower_config"


def _read(config: _Json, tower_config: _Json | None) -> VlmOptions:
    """config.json in either spelling of Phi-2 -> options. A tower's own config.json must not contradict that inside."""
    current = phi2_legacy.current(config)
    options = original.read(current, config.get(_TOWER, tower_config), family="imp", parts=PARTS, classes=_CLASSES)
    if _TOWER in config and tower_config is not None:
        vision = options.vision
        given = PARTS.vision_options(tower_config, config["mm_vision_select_layer"], vision.keep_first_token)
        native.check_same_tower(vision, given)
    # A row of the vocabulary that no text has: the released configurations name one, for inference only.
    image_token_id = config.get("image_token_index")
    if image_token_id is not None and image_token_id >= options.llm.vocab_size:
        image_token_id = None
    return replace(options, image_token_id=image_token_id, hf=config)


def _write(options: VlmOptions) -> tuple[_Json, _Json | None]:
    """Options -> config.json, and the tower's where it did not stand inside."""
    source = options.hf
    config, tower = original.write(replace(options, hf=phi2_legacy.current(source)), parts=PARTS, classes=_CLASSES)
    if original.is_original(source) and _TOWER not in source:
        return config, tower
    return {**config, _TOWER: source.get(_TOWER, tower)}, None


def _write_legacy(options: VlmOptions) -> tuple[_Json, _Json | None]:
    """As `_write`, in the spelling of the first Phi-2. CheckpointError: another llm."""
    if options.llm.model_type != phi2.MODEL_TYPE:
        raise CheckpointError(
            f"the first spelling of Imp has no llm but Phi-2, and this one is {options.llm.model_type}; export with "
            "--dialect original"
        )
    config, tower = _write(options)
    return phi2_legacy.legacy(config, options.hf), tower


def _legacy_keys(options: VlmOptions) -> KeyMap:
    """No rows where the llm is none that was ever spelt so."""
    if options.llm.model_type != phi2.MODEL_TYPE:
        return KeyMap(())
    tower = {"": "transformer.vision_tower.vision_tower.vision_model."}
    return (
        siglip.keys(options.vision).renamed(ours="vision.", hf=tower)
        + published.keys(options.projector, "transformer.mm_projector.")
        + phi2_legacy.keys(options.llm).renamed(ours="llm.")
    )


def _compose(llm_hf: _Json, tower_hf: _Json) -> _Json:
    """config.json of a model of a plain llm and a plain tower, as Imp publishes it: transformers' LLaVA has no bias on
    its head, and Phi-2 has one."""
    start = native.read(native.compose(llm_hf, tower_hf, parts=PARTS), None, family="imp", parts=PARTS)
    llm = PARTS.llm_options(llm_hf, "the llm's config.json")
    config, _ = _write(replace(start, llm=llm))
    aspect, max_tokens = _RELEASED[llm.model_type]
    return {**config, "image_aspect_ratio": aspect, "tokenizer_model_max_length": max_tokens}


FAMILY = family(
    name="imp",
    parts=PARTS,
    template="phi2",
    more={
        "original": Spelling(
            holds=original.is_original,
            read=_read,
            write=_write,
            keys=partial(original.keys, parts=PARTS),
            compose=_compose,
        ),
        "legacy": Spelling(holds=phi2_legacy.is_legacy, read=_read, write=_write_legacy, keys=_legacy_keys),
    },
    starts_in="original",
)
read, write = FAMILY.read, FAMILY.write
