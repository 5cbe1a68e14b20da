"""Phi-3: a Llama whose queries, keys and values are one matrix, and whose gate and up projection are another."""

from typing import Any

from megamm.models.llm import llama, rows
from megamm.models.llm.fields import Fields
from megamm.models.options import LlmOptions
from megamm.weights.keymap import KeyMap

MODEL_TYPE = "phi3"
DEFAULTS: dict[str, Any] = {
    # What transformers' Phi3Config assumes for a field that config.json leaves out.
    **llama.DEFAULTS,
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "partial_rotary_factor": 1.0,
    "sliding_window": None,
}
_FIELDS = Fields(
    model_type=MODEL_TYPE,
    defaults=DEFAULTS,
    options={"rms_norm_eps": "norm_eps", "sliding_window": "window"},
    only={"hidden_act": "silu", "attention_bias": False},
    fixed={"norm": "RMSNorm"},
)
from_hf, to_hf = _FIELDS.read, _FIELDS.write


def keys(options: LlmOptions) -> KeyMap:
    """The table of a Phi3ForCausalLM checkpoint: `qkv_proj` holds all queries, all keys, all values in this order,
    `gate_up_proj` the gate first."""
    h, f, layer = options.hidden_size, options.ffn_size, "model.layers.{i}."
    q, qkv, fc1 = (
        options.num_heads * options.head_dim,
        rows.LAYER + "self_attention.linear_qkv",
        rows.LAYER + "mlp.linear_fc1",
    )
    return KeyMap(
        [
            *rows.vocabulary(options, "model.embed_tokens", "lm_head"),
            *rows.norm(options, qkv + ".layer_norm_", layer + "input_layernorm"),
            *rows.linear(
                qkv,
                (layer + "self_attn.qkv_proj",),
                (rows.qkv_size(options), h),
                pack="qkv_fused",
                tp="col",
                has_bias=False,
            ),
            *rows.linear(
                rows.LAYER + "self_attention.linear_proj",
                (layer + "self_attn.o_proj",),
                (h, q),
                tp="row",
                has_bias=False,
            ),
            *rows.norm(options, fc1 + ".layer_norm_", layer + "post_attention_layernorm"),
            *rows.linear(fc1, (layer + "mlp.gate_up_proj",), (2 * f, h), tp="col2", has_bias=False),
            *rows.linear(rows.LAYER + "mlp.linear_fc2", (layer + "mlp.down_proj",), (h, f), tp="row", has_bias=False),
            *rows.norm(options, "decoder.final_layernorm.", "model.norm"),
        ],
        rows.dims(options),
    )
