"""A tiny random checkpoint of every family, in the layout that its authors publish, with the tokenizer to run it.

Sizes are given as the authors' config.json gives them; names and shapes of the tensors come from the family's own
table. For tests, the quickstart and benchmarks.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from megamm.registry import family
from megamm.testing.tiny import draw_tensor, write_tokenizer
from megamm.weights.hf import HfWriter, TensorInfo, new_directory, write_json

VOCAB = 512
_LLM = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
_LLAMA = _LLM | {"hidden_act": "silu", "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_QWEN2 = _LLM | {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "use_sliding_window": False}
_TOWER = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 48,
    "patch_size": 16,
}
_CLIP = _TOWER | {"model_type": "clip_vision_model", "hidden_act": "quick_gelu", "projection_dim": 64}
_SIGLIP = _TOWER | {"model_type": "siglip_vision_model", "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
_LLAVA_LINE = {
    "mm_hidden_size": 64,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "mm_vision_tower": "vision_tower",
    "image_aspect_ratio": "pad",
}
_VW_LMM = _LLAMA | _LLAVA_LINE | {"model_type": "llava"}


@dataclass(frozen=True, kw_only=True, slots=True)
class TinyModel:
    """What is written for one family."""

    config: dict[str, Any]
    """config.json."""
    tower: dict[str, Any] | None = None
    """The tower's own config.json, where the layout keeps it apart."""
    tower_prefix: str = ""
    """In front of the tower's names, which are those of transformers; "": the table alone says what the tower has."""
    dialect: str | None = None
    """The spelling of `config`; None: the family's export dialect."""
    tokenizer: Literal["sentencepiece", "bytes"] = "sentencepiece"
    template: str
    """Conversation format that fits the tokenizer."""


_ORIGINAL = "model.vision_tower.vision_tower."
TINY: dict[str, TinyModel] = {
    "tinyllava": TinyModel(
        config=_LLAMA | _LLAVA_LINE | {"model_type": "tiny_llava"},
        tower=_SIGLIP,
        dialect="original",
        template="v1",
        tower_prefix=_ORIGINAL,
    ),
    "imp": TinyModel(
        config=_QWEN2 | _LLAVA_LINE | {"model_type": "imp_qwen2", "vision_tower_config": _SIGLIP},
        tokenizer="bytes",
        template="qwen2",
    ),
    "vw_lmm": TinyModel(config=_VW_LMM, tower=_CLIP, template="v1", tower_prefix=_ORIGINAL),
    "vw_lmm_pif": TinyModel(config=_VW_LMM, tower=_CLIP, template="v1", tower_prefix=_ORIGINAL),
    "mplug_owl2": TinyModel(
        config=_LLAMA
        | {
            "model_type": "mplug_owl2",
            "num_key_value_heads": 4,
            "visual_config": {
                "visual_model": _TOWER
                | {"model_type": "mplug_owl_vision_model", "num_hidden_layers": 2, "layer_norm_eps": 1e-6},
                "visual_abstractor": {
                    "model_type": "mplug_owl_visual_abstract",
                    "num_learnable_queries": 16,
                    "hidden_size": 64,
                    "encoder_hidden_size": 64,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 4,
                    "intermediate_size": 160,
                    "layer_norm_eps": 1e-6,
                    "grid_size": 3,
                },
            },
        },
        template="v1",
    ),
    "mplug_owl3": TinyModel(
        config=_QWEN2 | {"model_type": "mplugowl3", "hyper_layers": [1, 2], "vision_config": _SIGLIP},
        tokenizer="bytes",
        template="mplug_owl3",
    ),
}
"""Beside llava, whose native layout testing/tiny.py writes with a processor."""


def tiny(directory: str | Path, name: str, *, texts: Iterable[str], seed: int = 0) -> None:
    """Write a random checkpoint of family `name`, float32. `texts` train its tokenizer. `directory` must be new.

    A tower that the layout describes apart is described in DIRECTORY/vision_tower, its weights among the rest.
    """
    model, found = TINY[name], family(name)
    options = found.read(model.config, model.tower)
    table = found.keys[model.dialect or found.export_dialect](options)
    shapes = {key: shape for entry in table.entries() for key, shape in zip(entry.hf, entry.hf_shapes, strict=True)}
    if model.tower_prefix:  # with what the release stores and no forward uses
        shapes = {model.tower_prefix + key: shape for key, shape in _tower_shapes(model.tower or {}).items()} | shapes
    generator = torch.Generator().manual_seed(seed)
    with new_directory(directory) as aside:
        with HfWriter(aside, {key: TensorInfo(shape, torch.float32) for key, shape in shapes.items()}) as writer:
            for key, shape in shapes.items():
                writer.write(key, draw_tensor(key, torch.empty(shape), generator))
        if model.tower is not None:
            (aside / "vision_tower").mkdir()
            write_json(aside / "vision_tower" / "config.json", model.tower)
        ids = write_tokenizer(aside, texts, VOCAB, model.template, model.tokenizer)
        write_json(aside / "config.json", model.config | ids)


def _tower_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names as published, `vision_model.` in front, and shapes of everything a tower's file holds."""
    with torch.device("meta"):
        if config["model_type"] == "clip_vision_model":
            tensors = CLIPVisionModel(CLIPVisionConfig(**config)).state_dict()
        else:
            tensors = SiglipVisionModel(SiglipVisionConfig(**config)).state_dict()
    return {
        f"vision_model.{key.removeprefix('vision_model.')}": tuple(value.shape)
        for key, value in tensors.items()
        if isinstance(value, Tensor) and "position_ids" not in key
    }
