"""Phi-2: LayerNorm, attention and MLP side by side, part of each head's channels rotated, a bias on every linear and on
the head. A family whose authors dropped the head's bias says so in its own file."""

from typing import Any

from megamm.models.llm import rows
from megamm.models.llm.fields import Fields
from megamm.models.options import LlmOptions
from megamm.weights.keymap import KeyMap, Row

MODEL_TYPE = "phi"
DEFAULTS: dict[str, Any] = {
    # What transformers' PhiConfig assumes for a field that config.json leaves out.
    "vocab_size": 51200,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "layer_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "tie_word_embeddings": False,
}
_FIELDS = Fields(
    model_type=MODEL_TYPE,
    defaults=DEFAULTS,
    options={"layer_norm_eps": "norm_eps"},
    only={"hidden_act": "gelu_new", "qk_layernorm": False},
    fixed={
        "norm": "LayerNorm",
        "activation": "gelu_tanh",
        "is_gated": False,
        "has_qkv_bias": True,
        "has_bias": True,
        "has_head_bias": True,
        "has_parallel_residual": True,
    },
    aliases={"activation_function": "hidden_act"},
)
from_hf, to_hf = _FIELDS.read, _FIELDS.write


def keys(options: LlmOptions) -> KeyMap:
    """The table of a PhiForCausalLM checkpoint."""
    layer, attention = "model.layers.{i}.", "model.layers.{i}.self_attn."
    return KeyMap(
        [
            *rows.vocabulary(options, "model.embed_tokens", "lm_head"),
            *layer_rows(
                options,
                norm=layer + "input_layernorm",
                qkv=tuple(f"{attention}{x}_proj" for x in "qkv"),
                proj=attention + "dense",
                mlp=layer + "mlp.",
            ),
            *rows.norm(options, "decoder.final_layernorm.", "model.final_layernorm"),
        ],
        rows.dims(options),
    )


def layer_rows(options: LlmOptions, *, norm: str, qkv: tuple[str, ...], proj: str, mlp: str) -> list[Row]:
    """The rows of one layer, whatever its parts are called; queries, keys and values in three tensors or in one."""
    h, f, q = options.hidden_size, options.ffn_size, options.num_heads * options.head_dim
    attention, has_bias = rows.LAYER + "self_attention.", options.has_bias
    pack, shape = "qkv" if len(qkv) == 3 else "qkv_fused", (rows.qkv_size(options), h)
    return [
        *rows.norm(options, rows.LAYER + "input_layernorm.", norm),
        *rows.linear(attention + "linear_qkv", qkv, shape, pack=pack, tp="col", has_bias=options.has_qkv_bias),
        *rows.linear(attention + "linear_proj", (proj,), (h, q), tp="row", has_bias=has_bias),
        *rows.linear(rows.LAYER + "mlp.linear_fc1", (mlp + "fc1",), (f, h), tp="col", has_bias=has_bias),
        *rows.linear(rows.LAYER + "mlp.linear_fc2", (mlp + "fc2",), (h, f), tp="row", has_bias=has_bias),
    ]
