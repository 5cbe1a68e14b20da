"""Mistral: a Llama with grouped queries, whose attention may reach back over a window only."""

from typing import Any

from megamm.models.llm import llama
from megamm.models.llm.fields import Fields

MODEL_TYPE = "mistral"
DEFAULTS: dict[str, Any] = {
    # What transformers' MistralConfig assumes for a field that config.json leaves out.
    **llama.DEFAULTS,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}
_FIELDS = Fields(
    model_type=MODEL_TYPE,
    defaults=DEFAULTS,
    options={"rms_norm_eps": "norm_eps", "sliding_window": "window"},
    only={"hidden_act": "silu"},
    fixed={"norm": "RMSNorm"},
)
from_hf, to_hf, keys = _FIELDS.read, _FIELDS.write, llama.keys
