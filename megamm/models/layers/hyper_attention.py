"""mPLUG-Owl3's hyper layers: decoder layers whose text looks at visual tokens that are no part of its sequence.

The visual tokens arrive as megatron-core's `context` (rows, picture after picture), and who sees what as its
`context_mask`: two tensors, so that recomputation passes them on. Each layer reads them anew and changes neither.
Source: arXiv 2408.04840 and the authors' released code, in both generations.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd, apply_rotary_pos_emb
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import (
    all_gather_last_dim_from_tensor_parallel_region,
    copy_to_tensor_model_parallel_region,
)
from megatron.core.transformer import TransformerConfig, TransformerLayer
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from torch import Tensor

from megamm import backend
from megamm.models.options import HyperOptions


def is_visual_way(name: str) -> bool:
    """Whether only what comes of visual tokens goes through the parameter of that canonical name."""
    return "self_attention.linear_image_kv." in name or "self_attention.gate." in name


@dataclass
class HyperAttentionSubmodules(SelfAttentionSubmodules):
    """The modules of a self-attention, and the linear that makes keys and values of visual tokens."""

    linear_image_kv: Any = None


class HyperAttention(SelfAttention):
    """Self-attention and attention to pictures with the same queries, tensor parallel by heads.

    `gated`: two attentions, mixed per head and channel by a gate computed from the first. `joint`: one softmax over the
    keys of pictures and text.
    """

    def __init__(
        self, config: TransformerConfig, submodules: HyperAttentionSubmodules, *, hyper: HyperOptions, **kwargs: Any
    ):
        super().__init__(config, submodules, **kwargs)
        self.hyper = hyper
        self.linear_image_kv = submodules.linear_image_kv(
            config.hidden_size,
            2 * self.kv_projection_size,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=True,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name="image_kv",
            tp_group=self.pg_collection.tp,
        )
        self.gate: torch.nn.Linear | None = None
        if hyper.kind == "gated":
            width = self.hidden_size_per_attention_head
            self.gate = torch.nn.Linear(width, width, device=backend.current().device, dtype=config.params_dtype)

    def forward(
        self,
        x_SBH: Tensor,
        features_R1H: Tensor,
        starts_BM: Tensor,
        rotary_pos_emb: Tensor,
        attention_mask: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Normalised hidden states and visual tokens (both [/ tp] under sequence parallelism) -> [S, B, H] and a bias
        or None. `starts_BM` as in `Batch`; `rotary_pos_emb` [S, 1, 1, D]: the angles of each position; of a packed row
        those of its longest sample."""
        query_SBND, key_SBGD, value_SBGD = self.get_query_key_value_tensors(x_SBH)
        tokens_S = torch.arange(query_SBND.size(0), device=starts_BM.device)
        samples_S: Tensor | None = None
        if packed_seq_params is not None:
            bounds = packed_seq_params.cu_seqlens_q
            samples_S = torch.searchsorted(bounds, tokens_S, right=True, out_int32=True) - 1
            rotary_pos_emb = rotary_pos_emb.index_select(0, tokens_S - bounds[samples_S])
        query_SBND, key_SBGD = (
            apply_rotary_pos_emb(x, rotary_pos_emb, config=self.config, cp_group=self.pg_collection.cp)
            for x in (query_SBND, key_SBGD)
        )
        images_KBGD = self.image_keys_values(features_R1H, starts_BM, rotary_pos_emb)
        sees_BSM = (starts_BM + self.hyper.delay).unsqueeze(1) <= tokens_S.unsqueeze(1)
        if samples_S is not None:
            of_image_BM = samples_S[starts_BM.clamp(max=len(samples_S) - 1)]
            sees_BSM &= of_image_BM.unsqueeze(1) == samples_S.unsqueeze(1)
        if self.gate is None:
            is_causal_SS = tokens_S <= tokens_S.unsqueeze(1)
            if samples_S is not None:
                is_causal_SS &= samples_S == samples_S.unsqueeze(1)
            mask_BSK = sees_BSM.repeat_interleave(self.hyper.tokens_per_image, dim=2)
            mask_BSK = torch.cat([mask_BSK, is_causal_SS.expand(len(starts_BM), -1, -1)], dim=2)
            key_KBGD, value_KBGD = (
                torch.cat([of_images, of_text])
                for of_images, of_text in zip(images_KBGD, (key_SBGD, value_SBGD), strict=True)
            )
            return self.linear_proj(attend(query_SBND, key_KBGD, value_KBGD, mask_BSK).flatten(2))
        of_text = (query_SBND, key_SBGD, value_SBGD)
        if packed_seq_params is not None:  # megatron-core's packed layout has no B
            of_text = tuple(x.squeeze(1) for x in of_text)
        text_SBND = self.core_attention(
            *of_text, attention_mask, attn_mask_type=self.attn_mask_type, packed_seq_params=packed_seq_params
        ).view_as(query_SBND)
        sees_any_BS1 = sees_BSM.any(dim=2, keepdim=True)
        # A token that sees no picture looks at all of them instead of none, whose softmax is not a number; its gate is
        # shut, so neither a value nor a gradient comes of it.
        mask_BSK = (sees_BSM | ~sees_any_BS1).repeat_interleave(self.hyper.tokens_per_image, dim=2)
        image_SBND = attend(query_SBND, *images_KBGD, mask_BSK)
        # Every tensor parallel rank has the whole gate and only its own heads: the sum over ranks is the gradient.
        weight, bias = map(copy_to_tensor_model_parallel_region, (self.gate.weight, self.gate.bias))
        gate_SBND = torch.sigmoid(F.linear(text_SBND, weight, bias)) * sees_any_BS1.transpose(0, 1).unsqueeze(-1)
        mixed_SBND = text_SBND * (1 - gate_SBND) + image_SBND * gate_SBND
        return self.linear_proj(mixed_SBND.flatten(2))

    def image_keys_values(
        self, features_R1H: Tensor, starts_BM: Tensor, rotary_pos_emb: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of the pictures of each row, both [K, B, G, D] with K = M pictures x their visual tokens; a
        row with fewer pictures has any in place of those that it lacks."""
        kv_R1X, _ = self.linear_image_kv(features_R1H)
        if self.config.num_query_groups < self.world_size:
            # As megatron-core does for text: a rank needs one whole group, of which it made only a part.
            kv_R1X = all_gather_last_dim_from_tensor_parallel_region(kv_R1X)
            group = self.pg_collection.tp.rank() // (self.world_size // self.config.num_query_groups)
            kv_R1X = kv_R1X.chunk(self.config.num_query_groups, dim=-1)[group]
        patches, width = self.hyper.tokens_per_image, self.hidden_size_per_attention_head
        num_images = kv_R1X.size(0) // patches  # rows behind the last whole picture are padding
        kv_IPG2D = kv_R1X[: num_images * patches].view(num_images, patches, -1, 2, width)

        length, (size, most) = rotary_pos_emb.size(0), starts_BM.shape
        counts_B = (starts_BM < length).sum(dim=1)
        own_BM = (counts_B.cumsum(0) - counts_B).unsqueeze(1) + torch.arange(most, device=starts_BM.device)
        kv_XPG2D = kv_IPG2D.index_select(0, own_BM.clamp(max=num_images - 1).flatten())
        key_XPGD, value_XPGD = kv_XPG2D.unbind(dim=3)

        # All keys of a picture are rotated like the token that sees it first. In float32, as the authors do.
        first_X = (starts_BM + self.hyper.delay).clamp(max=length - 1).flatten()
        angles_X11D = rotary_pos_emb.index_select(0, first_X)
        is_interleaved = self.config.rotary_interleaved
        key_XPGD = _apply_rotary_pos_emb_bshd(key_XPGD.float(), angles_X11D, is_interleaved).to(key_XPGD.dtype)
        key_KBGD, value_KBGD = (
            x.reshape(size, most * patches, *x.shape[2:]).transpose(0, 1) for x in (key_XPGD, value_XPGD)
        )
        return key_KBGD, value_KBGD


def attend(query_SBND: Tensor, key_KBGD: Tensor, value_KBGD: Tensor, mask_BSK: Tensor) -> Tensor:
    """Grouped-query attention -> [S, B, N, D]; the mask is True where a query looks, the same for every head."""
    repeats = query_SBND.size(2) // key_KBGD.size(2)
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query_SBND, key_KBGD, value_KBGD))
    # Repeated here and not by enable_gqa, with which torch's memory-efficient kernels take no mask.
    key, value = (x.repeat_interleave(repeats, dim=1) if repeats > 1 else x for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, mask_BSK.unsqueeze(1)).permute(2, 0, 1, 3)


class HyperLayer(TransformerLayer):
    """A decoder layer around a HyperAttention: one norm for hidden states and visual tokens alike."""

    def _forward_attention(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        """`context`: visual tokens [R, 1, H], zero padded and [/ tp] under sequence parallelism, so that each rank
        normalises its share and the norm's gradient is partial for both; `context_mask`: int64 [B, M], starts."""
        assert context is not None and context_mask is not None
        # Under sequence parallelism the number of rows is padded with zeros, whose norm is zero.
        output_with_bias = self.self_attention(
            self.input_layernorm(hidden_states),
            self.input_layernorm(context),
            context_mask,
            rotary_pos_emb,
            attention_mask,
            packed_seq_params,
        )
        with self.bias_dropout_add_exec_handler():
            add = self.self_attn_bda(self.training, self.config.bias_dropout_fusion)
            return add(output_with_bias, hidden_states, self.hidden_dropout), context
