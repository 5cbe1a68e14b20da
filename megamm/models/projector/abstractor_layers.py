"""mPLUG-Owl2's visual abstractor: learned queries attend to themselves and the image features, layer after layer.

Each layer's residual starts from the normalised queries; fixed sine positions are added to what queries and keys are
made of, never to values; the MLP has a norm inside. A learned vector ends the visual tokens of every picture.
Source: arXiv 2311.04257, section 3.1, and the authors' mplug_owl2/model/visual_encoder.py.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    checkpoint,
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor

from megamm import backend
from megamm.models.layers.modules import Modules
from megamm.models.options import ProjectorOptions

NORM_EPS = 1e-5
"""Of every norm but the one inside the MLP: torch's default, which no config.json says."""


def sine_positions(positions: Tensor, width: int) -> Tensor:
    """Positions [N] -> float32 [N, width]: sines of falling frequency, then the cosines."""
    frequencies = 1.0 / 10000 ** (torch.arange(width // 2, dtype=torch.float32) / (width / 2))
    angles = positions.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def key_positions(num_features: int, width: int) -> Tensor:
    """float32 [1 + G * G, width] of a class token, zeros, and G x G patches row by row: first the column's, then the
    row's. ValueError: the features are no such square."""
    grid = round((num_features - 1) ** 0.5)
    if grid * grid + 1 != num_features:
        raise ValueError(f"{num_features} features are not a class token and a square of patches")
    row, column = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    patches = torch.cat([sine_positions(x.flatten(), width // 2) for x in (column, row)], dim=1)
    return torch.cat([patches.new_zeros(1, width), patches])


class InnerNorm(MegatronModule):
    """LayerNorm over channels that tensor parallelism cuts: weight and bias are slices, the statistics of all channels
    are summed over the ranks, in both directions."""

    def __init__(self, config: TransformerConfig, size: int, eps: float):
        super().__init__(config=config)
        self.size, self.eps = size, eps
        self.tp_group = parallel_state.get_tensor_model_parallel_group()
        local = size // self.tp_group.size()
        device, dtype = backend.current().device, config.params_dtype
        self.weight = torch.nn.Parameter(torch.ones(local, device=device, dtype=dtype))
        self.bias = torch.nn.Parameter(torch.zeros(local, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """[..., F / tp] -> [..., F / tp], statistics in float32; first the mean, then the variance around it, for the
        difference of two large sums would lose it."""
        centred = x.float() - self._mean(x.float())
        normalised = centred * torch.rsqrt(self._mean(centred.square()) + self.eps)
        return (normalised * self.weight.float() + self.bias.float()).to(x.dtype)

    def _mean(self, x: Tensor) -> Tensor:
        # Every rank's output depends on the sum, so its gradient, too, is summed over the ranks.
        total = reduce_from_tensor_model_parallel_region(x.sum(-1, keepdim=True))
        return copy_to_tensor_model_parallel_region(total) / self.size

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Both parameters cut along their only dimension."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0, "bias": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )


class AbstractorLayer(MegatronModule):
    """Queries [Q, I, A], features [P, I, A] and their positions [Q, 1, A] and [P, 1, A] -> queries. Attention heads and
    the MLP's channels are cut over the ranks."""

    def __init__(self, options: ProjectorOptions, config: TransformerConfig, layer_number: int):
        super().__init__(config=config)
        layers = backend.current().layers
        a, f = options.in_size, options.ffn_size
        common: dict[str, Any] = dict(
            config=config, init_method=config.init_method, bias=True, skip_bias_add=False, is_expert=False
        )
        norm: dict[str, Any] = dict(config=config, hidden_size=a, eps=NORM_EPS)
        self.head_dim = a // options.num_heads
        self.query_norm = layers.norm(**norm)
        self.feature_norm = layers.norm(**norm)
        self.linear_q = layers.column_linear(a, a, gather_output=False, **common)
        self.linear_k = layers.column_linear(a, a, gather_output=False, **common)
        self.linear_v = layers.column_linear(a, a, gather_output=False, **common)
        self.core_attention = layers.core_attention(
            config=config,
            layer_number=layer_number,
            attn_mask_type=AttnMaskType.no_mask,
            attention_type="cross",
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"]),
        )
        self.linear_proj = layers.row_linear(a, a, input_is_parallel=True, **common)
        self.mlp_norm = layers.norm(**norm)
        self.linear_gate = layers.column_linear(a, f, gather_output=False, **common)
        self.linear_up = layers.column_linear(a, f, gather_output=False, **common)
        self.inner_norm = InnerNorm(config, f, options.inner_norm_eps)
        self.linear_down = layers.row_linear(f, a, input_is_parallel=True, **common)

    def forward(self, x_QIA: Tensor, features_PIA: Tensor, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        """One layer; whole on every tensor parallel rank."""
        x_QIA = self.query_norm(x_QIA)
        seen = torch.cat([x_QIA, self.feature_norm(features_PIA)])
        query, _ = self.linear_q(x_QIA + query_positions)
        key, _ = self.linear_k(seen + torch.cat([query_positions, key_positions]))
        value, _ = self.linear_v(seen)
        query, key, value = (x.view(*x.shape[:-1], -1, self.head_dim) for x in (query, key, value))
        context = self.core_attention(query, key, value, None, attn_mask_type=AttnMaskType.no_mask)
        x_QIA = x_QIA + self.linear_proj(context)[0]
        inner = self.mlp_norm(x_QIA)
        inner = F.silu(self.linear_gate(inner)[0]) * self.linear_up(inner)[0]
        return x_QIA + self.linear_down(self.inner_norm(inner))[0]


class Abstractor(MegatronModule):
    """The unit `projector`: features of all of a picture's positions, class token first -> its visual tokens."""

    def __init__(self, options: ProjectorOptions, config: TransformerConfig, num_features: int):
        super().__init__(config=config)
        a, device, dtype = options.in_size, backend.current().device, config.params_dtype
        self.query_tokens = torch.nn.Parameter(torch.empty(options.num_queries, a, device=device, dtype=dtype))
        self.end_token = torch.nn.Parameter(torch.empty(options.out_size, device=device, dtype=dtype))
        self.layers = Modules(config, (AbstractorLayer(options, config, i + 1) for i in range(options.num_layers)))
        self.linear_out = torch.nn.Linear(a, options.out_size, device=device, dtype=dtype)
        queries = sine_positions(torch.arange(options.num_queries), a)
        for name, table in (("query_positions", queries), ("key_positions", key_positions(num_features, a))):
            self.register_buffer(name, table.unsqueeze(1).to(device, dtype), persistent=False)

    def forward(self, features_PIA: Tensor) -> Tensor:
        """[P, I, hv] -> [Q + 1, I, H]; whole on every tensor parallel rank."""
        num_images = features_PIA.size(1)
        x_QIA = self.query_tokens.unsqueeze(1).expand(-1, num_images, -1)
        is_recomputed = self.config.recompute_granularity == "full" and self.training
        for layer in self.layers:
            arguments = (x_QIA, features_PIA, self.query_positions, self.key_positions)
            x_QIA = checkpoint(layer, False, *arguments) if is_recomputed else layer(*arguments)
        end_1IH = self.end_token.expand(1, num_images, -1)
        return torch.cat([self.linear_out(x_QIA), end_1IH])
