"""VW-LMM: LLaVA-1.5 with a head of visual words, on Vicuna or Mistral. Source: arXiv 2403.07720.

Two families of one layout: `vw_lmm`, whose llm reads visual tokens, and `vw_lmm_pif`, whose llm reads pseudo image
features; nothing in a release tells them apart. Published in the spelling of LLaVA's authors with one more key.
transformers' llava holds the first without its head, which only training needs, and cannot hold the second.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from megamm.errors import CheckpointError
from megamm.models import llava_line, original
from megamm.models.family import Family
from megamm.models.llm import llama, mistral
from megamm.models.options import VlmOptions
from megamm.models.original import Class
from megamm.models.parts import Parts
from megamm.models.vision import clip
from megamm.weights.keymap import Dims, KeyMap, Row

_PARTS = Parts(llms=(llama, mistral), visions=(clip,), projectors=("linear", "mlpNx_gelu"))
_HEAD = "words.vm_head.weight"


def _is_mistral(config: dict[str, Any]) -> bool:
    """The flat config.json says no model_type of its llm; only Mistral's has a window, be it null."""
    return "sliding_window" in config


def _family(name: str, prefix: str, *, has_pseudo_features: bool) -> Family:
    released = [Class(model_type="llava", architecture=f"{prefix}LlamaForCausalLM", llm=llama)]
    released += [Class(model_type="llava", architecture=f"{prefix}MistralForCausalLM", llm=mistral)]
    plain = [Class(model_type="llava_llama", architecture="LlavaLlamaForCausalLM", llm=llama)]
    plain += [Class(model_type="llava_mistral", architecture="LlavaMistralForCausalLM", llm=mistral)]
    line = llava_line.family(name=name, parts=_PARTS, template="v1", classes=released)

    def read(config: dict[str, Any], tower_config: dict[str, Any] | None = None) -> VlmOptions:
        """config.json in either spelling -> options; of a plain LLaVA-1.5, too, to start from."""
        if original.is_original(config):
            llm = mistral if _is_mistral(config) else llama
            classes = [one for one in (*released, *plain) if one.llm is llm]
            options = original.read(config, tower_config, family=name, parts=_PARTS, classes=classes)
        else:
            options = line.read(config, tower_config)
        return replace(options, has_visual_words=True, has_pseudo_features=has_pseudo_features)

    def write(options: VlmOptions, dialect: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Options -> config.json, and the tower's; what was read of a plain LLaVA is written as a VW-LMM."""
        if dialect == "hf" and has_pseudo_features:
            raise CheckpointError(
                f"transformers' llava cannot hold a {name}: its llm reads visual tokens, this one pseudo image "
                "features; export with --dialect original"
            )
        return line.write(options, dialect)

    def compose(llm_hf: dict[str, Any], tower_hf: dict[str, Any]) -> dict[str, Any]:
        """The flat config.json of a plain llm and a plain tower."""
        return line.write(line.read(line.compose(llm_hf, tower_hf), None), "original")[0]

    def keys(table: Callable[[VlmOptions], KeyMap], is_exported: bool) -> Callable[[VlmOptions], KeyMap]:
        return lambda options: table(options) + _head(options, is_exported)

    return replace(
        line,
        read=read,
        write=write,
        compose=compose,
        keys={"original": keys(line.keys["original"], True), "hf": keys(line.keys["hf"], False)},
        export_dialect="original",
        duplicated=_duplicated,
        is_recognised=not has_pseudo_features,
    )


def _head(options: VlmOptions, is_exported: bool) -> KeyMap:
    """The table of the head alone; an import in either spelling may have it or lack it."""
    llm = options.llm
    shape = (llm.padded_vocab_size, llm.hidden_size)
    row = Row(_HEAD, ("vm_head.weight",), shape, tp="vocab", is_exported=is_exported)
    return KeyMap((row,), Dims(vocab=llm.vocab_size, vocab_padded=llm.padded_vocab_size))


def _duplicated(options: VlmOptions) -> dict[str, str]:
    """Same shape, same role: a start from weights without visual words takes the llm's own head."""
    tied = options.llm.has_tied_embeddings
    return {_HEAD: "llm.embedding.word_embeddings.weight" if tied else "llm.output_layer.weight"}


FAMILY = _family("vw_lmm", "vw", has_pseudo_features=False)
PIF = _family("vw_lmm_pif", "vwPif", has_pseudo_features=True)
