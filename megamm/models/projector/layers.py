"""A projector of one linear or several: image features [P, I, hv] -> visual tokens [P, I, H]."""

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megamm import backend
from megamm.models.options import ProjectorOptions


class Projector(MegatronModule):
    """Linears with an exact GELU between: in pairs the first column-, the second row-parallel, an odd last one
    replicated."""

    def __init__(self, options: ProjectorOptions, config: TransformerConfig):
        super().__init__(config=config)
        current, h = backend.current(), options.out_size
        self.names = [f"linear_{k}" for k in range(1, options.num_linears + 1)]
        common = dict(config=config, init_method=config.init_method, bias=True, skip_bias_add=False, is_expert=False)
        for k, name in enumerate(self.names, start=1):
            width = options.in_size if k == 1 else h
            if k % 2 == 0:
                linear = current.layers.row_linear(width, h, input_is_parallel=True, **common)
            elif k < len(self.names):
                linear = current.layers.column_linear(width, h, gather_output=False, **common)
            else:
                linear = torch.nn.Linear(width, h, device=current.device, dtype=config.params_dtype)
            self.add_module(name, linear)

    def forward(self, x_PIH: Tensor) -> Tensor:
        """[P, I, hv] -> [P, I, H]; whole on every tensor parallel rank."""
        for k, name in enumerate(self.names):
            out = getattr(self, name)(F.gelu(x_PIH) if k else x_PIH)
            x_PIH = out[0] if isinstance(out, tuple) else out  # megatron-core's linears return their bias, too
        return x_PIH
