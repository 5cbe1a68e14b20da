"""Llama, Vicuna, TinyLlama: RMSNorm, SwiGLU, rotary positions, grouped queries, no biases.

Its table also holds for the decoders that were made after it and differ in what their options say.
"""

from typing import Any

from megamm.models.llm import rows
from megamm.models.llm.fields import Fields
from megamm.models.options import LlmOptions
from megamm.weights.keymap import Keep, KeyMap

MODEL_TYPE = "llama"
DEFAULTS: dict[str, Any] = {
    # What transformers' LlamaConfig assumes for a field that config.json leaves out.
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
_FIELDS = Fields(
    model_type=MODEL_TYPE,
    defaults=DEFAULTS,
    options={"rms_norm_eps": "norm_eps"},
    only={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    fixed={"norm": "RMSNorm"},
)
from_hf, to_hf = _FIELDS.read, _FIELDS.write


def keys(options: LlmOptions) -> KeyMap:
    """The table of a LlamaForCausalLM checkpoint, and of every other that spells its tensors so."""
    h, f, layer = options.hidden_size, options.ffn_size, "model.layers.{i}."
    q, attention, mlp = options.num_heads * options.head_dim, layer + "self_attn.", layer + "mlp."
    qkv, fc1 = rows.LAYER + "self_attention.linear_qkv", rows.LAYER + "mlp.linear_fc1"
    proj, fc2 = rows.LAYER + "self_attention.linear_proj", rows.LAYER + "mlp.linear_fc2"
    projections = tuple(f"{attention}{x}_proj" for x in "qkv")
    gate_up = (mlp + "gate_proj", mlp + "up_proj")
    return KeyMap(
        [
            *rows.vocabulary(options, "model.embed_tokens", "lm_head"),
            *rows.norm(options, qkv + ".layer_norm_", layer + "input_layernorm"),
            *rows.linear(
                qkv, projections, (rows.qkv_size(options), h), pack="qkv", tp="col", has_bias=options.has_qkv_bias
            ),
            *rows.linear(proj, (attention + "o_proj",), (h, q), tp="row", has_bias=options.has_bias),
            *rows.norm(options, fc1 + ".layer_norm_", layer + "post_attention_layernorm"),
            *rows.linear(fc1, gate_up, (2 * f, h), pack="cat2", tp="col2", has_bias=options.has_bias),
            *rows.linear(fc2, (mlp + "down_proj",), (h, f), tp="row", has_bias=options.has_bias),
            *rows.norm(options, "decoder.final_layernorm.", "model.norm"),
            Keep(attention + "rotary_emb.inv_freq"),
        ],
        rows.dims(options),
    )
