"""Llama, Vicuna, TinyLlama: RMSNorm, SwiGLU, rotary positions, grouped queries, no biases."""

from typing import Any

from megamm.errors import CheckpointError
from megamm.models.family import overlay
from megamm.models.options import LlmOptions
from megamm.weights.keymap import Dims, Keep, KeyMap, Row

MODEL_TYPE = "llama"
DEFAULTS: dict[str, Any] = {
    # What transformers' LlamaConfig assumes for a field that config.json leaves out.
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}


def keys(options: LlmOptions) -> KeyMap:
    """The table of a LlamaForCausalLM checkpoint."""
    vocab, h, f = options.padded_vocab_size, options.hidden_size, options.ffn_size
    q, kv = options.num_heads * options.head_dim, options.num_groups * options.head_dim
    layer, ours = "model.layers.{i}.", "decoder.layers.{i}."
    attention = layer + "self_attn."
    rows: tuple[Row | Keep, ...] = (
        Row("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), (vocab, h), tp="vocab"),
        Row(ours + "self_attention.linear_qkv.layer_norm_weight", (layer + "input_layernorm.weight",), (h,)),
        Row(
            ours + "self_attention.linear_qkv.weight",
            tuple(f"{attention}{x}_proj.weight" for x in "qkv"),
            (q + 2 * kv, h),
            pack="qkv",
            tp="col",
        ),
        Row(ours + "self_attention.linear_proj.weight", (attention + "o_proj.weight",), (h, q), tp="row"),
        Row(ours + "mlp.linear_fc1.layer_norm_weight", (layer + "post_attention_layernorm.weight",), (h,)),
        Row(
            ours + "mlp.linear_fc1.weight",
            (layer + "mlp.gate_proj.weight", layer + "mlp.up_proj.weight"),
            (2 * f, h),
            pack="cat2",
            tp="col2",
        ),
        Row(ours + "mlp.linear_fc2.weight", (layer + "mlp.down_proj.weight",), (h, f), tp="row"),
        Row("decoder.final_layernorm.weight", ("model.norm.weight",), (h,)),
        Keep(attention + "rotary_emb.inv_freq"),
    )
    if not options.has_tied_embeddings:
        rows += (Row("output_layer.weight", ("lm_head.weight",), (vocab, h), tp="vocab"),)
    return KeyMap(
        rows,
        Dims(
            layers=options.num_layers,
            heads=options.num_heads,
            groups=options.num_groups,
            vocab=options.vocab_size,
            vocab_padded=options.padded_vocab_size,
        ),
    )


def from_hf(config: dict[str, Any]) -> LlmOptions:
    """config.json of a Llama (or the text_config of a model around one) -> options."""
    get = {**DEFAULTS, **{k: v for k, v in config.items() if v is not None}}.__getitem__
    heads = get("num_attention_heads")
    for field, only in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
        if get(field) != only:
            raise CheckpointError(f"config.json: llama with {field} {get(field)!r} is not supported, only {only!r}")
    rope = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or {}
    kind = rope.get("rope_type", scaling.get("rope_type", scaling.get("type", "default")))
    if kind != "default":
        raise CheckpointError(f"config.json: rotary scaling {kind!r} is not supported, only the default")
    return LlmOptions(
        num_layers=get("num_hidden_layers"),
        hidden_size=get("hidden_size"),
        ffn_size=get("intermediate_size"),
        num_heads=heads,
        num_groups=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or get("hidden_size") // heads,
        vocab_size=get("vocab_size"),
        max_positions=get("max_position_embeddings"),
        norm="RMSNorm",
        norm_eps=get("rms_norm_eps"),
        rope_theta=float(rope.get("rope_theta", get("rope_theta"))),
        has_tied_embeddings=get("tie_word_embeddings"),
    )


def to_hf(options: LlmOptions, source: dict[str, Any]) -> dict[str, Any]:
    """Options -> config.json, written over the one they came from."""
    heads = options.num_heads
    known = {
        "model_type": MODEL_TYPE,
        "vocab_size": options.vocab_size,
        "hidden_size": options.hidden_size,
        "intermediate_size": options.ffn_size,
        "num_hidden_layers": options.num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": options.num_groups,
        "head_dim": options.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": options.max_positions,
        "rms_norm_eps": options.norm_eps,
        "tie_word_embeddings": options.has_tied_embeddings,
    }
    out = overlay(source, known, {**DEFAULTS, "num_key_value_heads": heads, "head_dim": options.hidden_size // heads})
    if "rope_parameters" in source:
        out["rope_parameters"] = {**source["rope_parameters"], "rope_theta": options.rope_theta}
        return out
    return overlay(out, {"rope_theta": options.rope_theta}, DEFAULTS)
