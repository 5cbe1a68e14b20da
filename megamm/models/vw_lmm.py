"""VW-LMM: LLaVA-1.5 with a head of visual words. Two families of one layout: `vw_lmm`, whose llm reads visual tokens,
and `vw_lmm_pif`, whose llm reads pseudo image features; nothing in a release tells them apart. Source: arXiv 2403.07720.

Published in the spelling of LLaVA's authors with one more key. transformers' llava holds the first without its head,
which only training needs, and cannot hold the second.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from megamm.errors import CheckpointError
from megamm.models import native, original
from megamm.models.family import Family
from megamm.models.llm import llama
from megamm.models.options import VlmOptions
from megamm.models.parts import LlmPart
from megamm.models.vision import clip
from megamm.weights.keymap import Dims, KeyMap, Row

_HEAD = "words.vm_head.weight"


def _decoder(config: dict[str, Any]) -> LlmPart:
    """The file of the decoder that a config.json is of; the flat spelling has no model_type of its own for it."""
    return llama


def _read(
    config: dict[str, Any], tower_config: dict[str, Any] | None = None, *, family: str, has_pseudo_features: bool
) -> VlmOptions:
    llm = _decoder(config)
    if original.is_original(config):
        options = original.read(
            config, tower_config, family=family, model_types=("llava", "llava_llama"), llm=llm, vision=clip
        )
    else:
        options = native.read(config, tower_config, family=family, llm=llm, vision=clip)
    return replace(options, has_visual_words=True, has_pseudo_features=has_pseudo_features)


def _write(options: VlmOptions, dialect: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
    llm = _decoder(options.hf)
    if dialect == "hf":
        if options.has_pseudo_features:
            raise CheckpointError(
                f"transformers' llava cannot hold a {options.family}: its llm reads visual tokens, this one pseudo image "
                "features; export with --dialect original"
            )
        return native.write(options, llm=llm, vision=clip), None
    return original.write(options, model_type="llava", architecture="vwLlamaForCausalLM", llm=llm, vision=clip)


def _compose(llm_hf: dict[str, Any], tower_hf: dict[str, Any], *, read: Callable[..., VlmOptions]) -> dict[str, Any]:
    """The flat config.json of a plain llm and a plain tower."""
    options = read(native.compose(llm_hf, tower_hf, llm=_decoder(llm_hf), vision=clip))
    return _write(options, "original")[0]


def _keys(options: VlmOptions, *, spelling: Callable[..., KeyMap], is_exported: bool) -> KeyMap:
    """LLaVA's table, and the head. Imports of either spelling may have it or lack it."""
    llm = options.llm
    head = Row(
        _HEAD, ("vm_head.weight",), (llm.padded_vocab_size, llm.hidden_size), tp="vocab", is_exported=is_exported
    )
    table = spelling(options, llm=_decoder(options.hf), vision=clip)
    return table + KeyMap((head,), Dims(vocab=llm.vocab_size, vocab_padded=llm.padded_vocab_size))


def _duplicated(options: VlmOptions) -> dict[str, str]:
    """Same shape, same role: a start from weights without visual words takes the llm's own head."""
    tied = options.llm.has_tied_embeddings
    return {_HEAD: "llm.embedding.word_embeddings.weight" if tied else "llm.output_layer.weight"}


def _family(name: str, has_pseudo_features: bool) -> Family:
    read = partial(_read, family=name, has_pseudo_features=has_pseudo_features)
    return Family(
        name=name,
        read=read,
        write=_write,
        compose=partial(_compose, read=read),
        keys={
            "original": partial(_keys, spelling=original.keys, is_exported=True),
            "hf": partial(_keys, spelling=native.keys, is_exported=False),
        },
        export_dialect="original",
        duplicated=_duplicated,
        is_recognised=not has_pseudo_features,
        template="v1",
    )


FAMILY = _family("vw_lmm", has_pseudo_features=False)
PIF = _family("vw_lmm_pif", has_pseudo_features=True)
