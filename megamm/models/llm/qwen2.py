"""Qwen1.5, Qwen2, Qwen2.5: a Llama whose queries, keys and values have a bias; the small ones tie their embeddings."""

from typing import Any

from megamm.models.llm import llama
from megamm.models.llm.fields import Fields

MODEL_TYPE = "qwen2"
DEFAULTS: dict[str, Any] = {
    # What transformers' Qwen2Config assumes for a field that config.json leaves out.
    **llama.DEFAULTS,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
}
_FIELDS = Fields(
    model_type=MODEL_TYPE,
    defaults=DEFAULTS,
    options={"rms_norm_eps": "norm_eps"},
    # No release switches its window on, and `sliding_window` says nothing without.
    only={"hidden_act": "silu", "use_sliding_window": False},
    fixed={"norm": "RMSNorm", "has_qkv_bias": True},
)
from_hf, to_hf, keys = _FIELDS.read, _FIELDS.write, llama.keys
