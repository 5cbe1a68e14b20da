"""The projector's layers: image features [P, I, hv] -> visual tokens [P, I, H]."""

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megamm import backend
from megamm.models.options import ProjectorOptions


class Projector(MegatronModule):
    """One linear, replicated; or two linears with an exact GELU between, the first column-, the second row-parallel."""

    def __init__(self, options: ProjectorOptions, config: TransformerConfig):
        super().__init__(config=config)
        current = backend.current()
        self.linear_2: torch.nn.Module | None = None
        if options.kind == "linear":
            self.linear_1: torch.nn.Module = torch.nn.Linear(
                options.in_size, options.out_size, device=current.device, dtype=config.params_dtype
            )
            return
        common = dict(config=config, init_method=config.init_method, bias=True, skip_bias_add=False, is_expert=False)
        self.linear_1 = current.layers.column_linear(options.in_size, options.out_size, gather_output=False, **common)
        self.linear_2 = current.layers.row_linear(options.out_size, options.out_size, input_is_parallel=True, **common)

    def forward(self, x_PIH: Tensor) -> Tensor:
        """[P, I, hv] -> [P, I, H]; whole on every tensor parallel rank."""
        if self.linear_2 is None:
            return self.linear_1(x_PIH)
        x_PIH, _ = self.linear_1(x_PIH)
        x_PIH, _ = self.linear_2(F.gelu(x_PIH))
        return x_PIH
