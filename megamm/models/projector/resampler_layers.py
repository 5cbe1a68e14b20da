"""Learned queries that attend to the image features, layer after layer: the layers of models/projector/resampler.py.

Source: Flamingo, arXiv 2204.14198; the code of TinyLLaVA Bench (`resampler`) and TinyLLaVA_Factory (`perceiver`).
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import checkpoint
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megamm import backend
from megamm.models.layers.modules import Modules
from megamm.models.options import ProjectorOptions

NORM_EPS = 1e-5
"""Of every norm: torch's default, which no config.json says."""


class ResamplerLayer(MegatronModule):
    """Queries [Q, I, d] and features [P, I, w] -> queries. Heads and the MLP's channels are cut over the ranks; in a
    perceiver the queries attend to themselves, too."""

    def __init__(self, options: ProjectorOptions, config: TransformerConfig, layer_number: int):
        super().__init__(config=config)
        layers = backend.current().layers
        d, inner = options.hidden_size, options.num_heads * options.head_dim
        self.is_perceiver = options.kind == "perceiver"
        width = d if self.is_perceiver else options.in_size
        common: dict[str, Any] = dict(
            config=config, init_method=config.init_method, bias=False, skip_bias_add=False, is_expert=False
        )
        self.head_dim = options.head_dim
        self.query_norm = layers.norm(config=config, hidden_size=d, eps=NORM_EPS)
        self.feature_norm = layers.norm(config=config, hidden_size=width, eps=NORM_EPS)
        self.linear_q = layers.column_linear(d, inner, gather_output=False, **common)
        self.linear_kv = layers.column_linear(width, 2 * inner, gather_output=False, **common)
        self.core_attention = layers.core_attention(
            config=config,
            layer_number=layer_number,
            attn_mask_type=AttnMaskType.no_mask,
            attention_type="cross",
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"]),
        )
        self.linear_proj = layers.row_linear(inner, d, input_is_parallel=True, **common)
        self.mlp_norm = layers.norm(config=config, hidden_size=d, eps=NORM_EPS)
        self.linear_fc1 = layers.column_linear(d, options.ffn_size, gather_output=False, **common)
        self.linear_fc2 = layers.row_linear(options.ffn_size, d, input_is_parallel=True, **common)

    def forward(self, x_QId: Tensor, features_PIw: Tensor) -> Tensor:
        """One layer; whole on every tensor parallel rank."""
        queries, seen = self.query_norm(x_QId), self.feature_norm(features_PIw)
        if self.is_perceiver:
            seen = torch.cat([seen, queries])
        query, key_value = self.linear_q(queries)[0], self.linear_kv(seen)[0]
        query = query.view(*query.shape[:-1], -1, self.head_dim)
        key, value = key_value.view(*key_value.shape[:-1], -1, 2 * self.head_dim).chunk(2, dim=-1)
        context = self.core_attention(query, key, value, None, attn_mask_type=AttnMaskType.no_mask)
        x_QId = x_QId + self.linear_proj(context)[0]
        return x_QId + self.linear_fc2(F.gelu(self.linear_fc1(self.mlp_norm(x_QId))[0]))[0]


class Resampler(MegatronModule):
    """The unit `projector`: as many visual tokens per picture as there are queries. A perceiver widens the features
    first, a resampler the queries last."""

    def __init__(self, options: ProjectorOptions, config: TransformerConfig):
        super().__init__(config=config)
        current, d = backend.current(), options.hidden_size
        place: dict[str, Any] = dict(device=current.device, dtype=config.params_dtype)
        self.queries = torch.nn.Parameter(torch.empty(options.num_queries, d, **place))
        self.linear_in: torch.nn.Linear | None = None
        self.linear_out: torch.nn.Linear | None = None
        if options.kind == "perceiver":
            self.linear_in = torch.nn.Linear(options.in_size, d, **place)
        else:
            self.linear_out = torch.nn.Linear(d, options.out_size, bias=False, **place)
        self.layers = Modules(config, (ResamplerLayer(options, config, i + 1) for i in range(options.num_layers)))
        self.norm = current.layers.norm(config=config, hidden_size=d, eps=NORM_EPS)

    def forward(self, features_PIH: Tensor) -> Tensor:
        """[P, I, hv] -> [Q, I, H]; whole on every tensor parallel rank."""
        if self.linear_in is not None:
            features_PIH = self.linear_in(features_PIH)
        x_QId = self.queries.unsqueeze(1).expand(-1, features_PIH.size(1), -1)
        is_recomputed = self.config.recompute_granularity == "full" and self.training
        for layer in self.layers:
            x_QId = checkpoint(layer, False, x_QId, features_PIH) if is_recomputed else layer(x_QId, features_PIH)
        x_QId = self.norm(x_QId)
        return x_QId if self.linear_out is None else self.linear_out(x_QId)
