"""StableLM-2 of 1.6 billion parameters: a Llama with LayerNorm, a bias on queries, keys and values, and part of each
head's channels rotated."""

from typing import Any

from megamm.models.llm import llama
from megamm.models.llm.fields import Fields

MODEL_TYPE = "stablelm"
DEFAULTS: dict[str, Any] = {
    # What transformers' StableLmConfig assumes for a field that config.json leaves out.
    "vocab_size": 50304,
    "hidden_size": 2560,
    "intermediate_size": 6912,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "layer_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.25,
    "use_qkv_bias": False,
    "tie_word_embeddings": False,
}
_FIELDS = Fields(
    model_type=MODEL_TYPE,
    defaults=DEFAULTS,
    options={"layer_norm_eps": "norm_eps", "use_qkv_bias": "has_qkv_bias"},
    only={"hidden_act": "silu", "qk_layernorm": False, "use_parallel_residual": False},
    fixed={"norm": "LayerNorm"},
    aliases={"norm_eps": "layer_norm_eps", "rope_pct": "partial_rotary_factor"},
)
from_hf, to_hf, keys = _FIELDS.read, _FIELDS.write, llama.keys
