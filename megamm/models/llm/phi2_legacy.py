"""Phi-2 as its first releases spelt it, in configuration and key names: another spelling of models/llm/phi2.py.

Source: revision d3186761bf5c4409f7679359284066c25ab668ee of microsoft/phi-2.
"""

from typing import Any

from megamm.models.llm import phi2, rows
from megamm.models.llm.fields import renamed
from megamm.models.options import LlmOptions
from megamm.weights.keymap import KeyMap

_NAMES = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_head_kv": "num_key_value_heads",
    "n_inner": "intermediate_size",
    "n_positions": "max_position_embeddings",
    "layer_norm_epsilon": "layer_norm_eps",
    "activation_function": "hidden_act",
}


def is_legacy(config: dict[str, Any]) -> bool:
    """Whether a config.json is written in this spelling."""
    return "n_embd" in config


def current(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json of this spelling in phi2's; one that is in phi2's as it is."""
    if not is_legacy(config):
        return config
    out = renamed(config, _NAMES)
    if out.get("intermediate_size") is None:
        out["intermediate_size"] = 4 * out["hidden_size"]
    out["partial_rotary_factor"] = out.pop("rotary_dim", 32) / (out["hidden_size"] // out["num_attention_heads"])
    return out


def legacy(config: dict[str, Any], source: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `current`: a config.json of phi2's in this spelling. What `source` gives as null stays so where
    that means the same."""
    out = renamed(config, {name: old for old, name in _NAMES.items()})
    head_dim = out["n_embd"] // out["n_head"]
    out["rotary_dim"] = int(out.pop("partial_rotary_factor") * head_dim)
    if source.get("n_inner", 0) is None and out["n_inner"] == 4 * out["n_embd"]:
        out["n_inner"] = None
    return out


def keys(options: LlmOptions) -> KeyMap:
    """The table: queries, keys and values in one tensor, the last norm inside the head."""
    layer = "transformer.h.{i}."
    return KeyMap(
        [
            *rows.vocabulary(options, "transformer.embd.wte", "lm_head.linear"),
            *phi2.layer_rows(
                options,
                norm=layer + "ln",
                qkv=(layer + "mixer.Wqkv",),
                proj=layer + "mixer.out_proj",
                mlp=layer + "mlp.",
            ),
            *rows.norm(options, "decoder.final_layernorm.", "lm_head.ln"),
        ],
        rows.dims(options),
    )
