"""LLaVA-1.5: CLIP ViT, linear or two-layer MLP, Llama; visual tokens replace the marker. Source: arXiv 2310.03744.

Published in transformers' spelling (models/native.py) and in that of the authors' code (models/original.py).
"""

from functools import partial
from typing import Any

from megamm.models import native, original
from megamm.models.family import Family
from megamm.models.llm import llama
from megamm.models.options import VlmOptions
from megamm.models.vision import clip

_native = partial(native.read, family="llava", llm=llama, vision=clip)
_original = partial(original.read, family="llava", model_types=("llava", "llava_llama"), llm=llama, vision=clip)


def read(config: dict[str, Any], tower_config: dict[str, Any] | None = None) -> VlmOptions:
    """config.json in either spelling -> options."""
    return (_original if original.is_original(config) else _native)(config, tower_config)


def write(options: VlmOptions, dialect: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Options -> config.json, and the tower's where the dialect keeps it apart."""
    if dialect == "original":
        return original.write(
            options, model_type="llava_llama", architecture="LlavaLlamaForCausalLM", llm=llama, vision=clip
        )
    return native.write(options, llm=llama, vision=clip), None


FAMILY = Family(
    name="llava",
    read=read,
    write=write,
    compose=partial(native.compose, llm=llama, vision=clip),
    keys={
        "hf": partial(native.keys, llm=llama, vision=clip),
        "original": partial(original.keys, llm=llama, vision=clip),
    },
    export_dialect="hf",
    template="v1",
)
