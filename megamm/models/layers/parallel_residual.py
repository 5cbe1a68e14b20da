"""The layer whose attention and MLP run side by side on one norm of its input, as in GPT-J and Phi-2."""

from typing import Any

from megatron.core.transformer import TransformerLayer
from torch import Tensor


class ParallelResidualLayer(TransformerLayer):
    """x + attention(norm(x)) + mlp(norm(x)): megatron-core's layer has only the two one after the other.

    Needs `input_layernorm`, `self_attention` and `mlp` of the submodules. Both branches reduce over the tensor parallel
    ranks by themselves, and give their bias apart, which is added once. Source: arXiv 2309.05463, and PhiDecoderLayer
    of transformers.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        context: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: Any = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [S, B, H], S divided by tp under sequence parallelism -> the same shape, and `context`."""
        normed_SBH = self.input_layernorm(hidden_states)
        attended = self.self_attention(
            normed_SBH,
            attention_mask=attention_mask,
            rotary_pos_emb=rotary_pos_emb,
            packed_seq_params=packed_seq_params,
        )
        for output, bias in (attended, self.mlp(normed_SBH)):
            hidden_states = hidden_states + output
            if bias is not None:
                hidden_states = hidden_states + bias
        return hidden_states, context
