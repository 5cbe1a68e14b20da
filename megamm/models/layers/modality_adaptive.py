"""mPLUG-Owl2's modality-adaptive decoder layer: norms, keys and values twice, for text and for visual tokens.

Queries, output projection and MLP are shared, and all tokens attend to each other. Both ways are computed for all
tokens and one is selected: shapes then depend on no data, and each way of each layer always gets a gradient, zero where
no token took it. That costs 2 H^2 more multiply-adds per token and layer, a sixth of a Llama layer's linears. Under
sequence parallelism each of the three linears in front of the attention gathers the sequence.
Source: arXiv 2311.04257, section 3.2.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel import split_tensor_along_last_dim
from megatron.core.transformer import TransformerConfig, TransformerLayer
from megatron.core.transformer.attention import Attention, CrossAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megamm.batch import IMAGE, Batch
from megamm.models.layers.modules import Modules

WAYS = ("text", "visual")
"""What the copies are for, in order."""


def is_visual_way(name: str) -> bool:
    """Whether only visual tokens go through the parameter of that canonical name."""
    return "norm.1." in name or "linear_kv.1." in name


def is_visual(batch: Batch) -> Tensor:
    """bool [S, B, 1]: whether a visual token stands there. Every stage knows it from the ids."""
    return (batch.ids_BS == IMAGE).t().unsqueeze(-1).contiguous()


class ModalityAdaptiveNorm(MegatronModule):
    """A norm per way. `is_visual` is set before every call, for the tokens of this rank."""

    def __init__(self, config: TransformerConfig, hidden_size: int, norm: type, eps: float = 1e-5):
        super().__init__(config=config)
        self.is_visual: Tensor
        for way in range(len(WAYS)):
            self.add_module(str(way), norm(config=config, hidden_size=hidden_size, eps=eps))

    def forward(self, x_SBH: Tensor) -> Tensor:
        """[S, B, H] -> [S, B, H], the whole sequence or this rank's part of it."""
        text, visual = (norm(x_SBH) for norm in self.children())
        return torch.where(self.is_visual, visual, text)


class ModalityAdaptiveAttention(Attention):
    """Self-attention whose keys and values come from one of two linears, token by token. `is_visual` is set before
    every call, for the whole sequence."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: CrossAttentionSubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ):
        super().__init__(
            config=config,
            submodules=submodules,
            layer_number=layer_number,
            attn_mask_type=attn_mask_type,
            attention_type="self",
            cp_comm_type=cp_comm_type,
            pg_collection=pg_collection,
        )
        self.is_visual: Tensor
        self.q_layernorm = self.k_layernorm = None  # megatron-core's forward asks for them
        common: dict[str, Any] = dict(
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=config.add_bias_linear or config.add_qkv_bias,
            skip_bias_add=False,
            is_expert=False,
            tp_group=self.pg_collection.tp,
        )
        self.linear_q = submodules.linear_q(config.hidden_size, self.query_projection_size, **common)
        self.linear_kv = Modules(
            config, (submodules.linear_kv(config.hidden_size, 2 * self.kv_projection_size, **common) for _ in WAYS)
        )

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        output_gate: bool = False,
        split_qkv: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[S, B, H] -> query, key and value [S, B, N / tp, D], the whole sequence also under sequence parallelism."""
        query, _ = self.linear_q(hidden_states)
        text, visual = (linear(hidden_states)[0] for linear in self.linear_kv)
        mixed = torch.where(self.is_visual, visual, text)
        mixed = mixed.view(*mixed.shape[:-1], self.num_query_groups_per_partition, -1)
        key, value = split_tensor_along_last_dim(mixed, 2)
        return query.view(*query.shape[:-1], self.num_attention_heads_per_partition, -1), key, value


class ModalityAdaptiveLayer(TransformerLayer):
    """A decoder layer that routes by the flags it is given as `context_mask`, bool [S, B, 1] of the whole sequence.

    megatron-core hands that argument to every layer, a recomputed one included; here it masks no context.
    """

    def forward(self, *args: Any, context_mask: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As TransformerLayer's."""
        local = context_mask
        if self.config.sequence_parallel:
            local = context_mask.chunk(self.tp_group.size())[self.tp_group.rank()]
        self.self_attention.is_visual = context_mask
        self.input_layernorm.is_visual = self.pre_mlp_layernorm.is_visual = local
        return super().forward(*args, **kwargs)
