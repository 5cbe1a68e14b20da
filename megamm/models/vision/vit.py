"""The trunk that every vision tower shares: normalised pixels, patches, positions, blocks. One stage's share of it."""

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from torch import Tensor

from megamm import backend
from megamm.models.layers.recompute import keep_gradient_path
from megamm.models.options import ImageOptions, VisionOptions
from megamm.models.spec import layer_spec
from megamm.parallel.placement import Stage


class Normalise(torch.nn.Module):
    """8-bit pixels -> what towers were trained on: (values / 255 - mean) / std, channel by channel."""

    mean: Tensor
    std: Tensor

    def __init__(self, options: ImageOptions, device: torch.device):
        super().__init__()
        # Buffers, made once: to make them in `forward` would wait for the GPU. No checkpoint holds them.
        self.register_buffer("mean", torch.tensor(options.mean, device=device)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(options.std, device=device)[:, None, None], persistent=False)

    def forward(self, pixels_I3HW: Tensor) -> Tensor:
        """uint8 [I, 3, H, W] -> float32 [I, 3, H, W], contiguous. What is floating-point is normalised already."""
        if pixels_I3HW.is_floating_point():
            return pixels_I3HW
        values_I3HW = pixels_I3HW.to(torch.float32, memory_format=torch.contiguous_format)
        return values_I3HW.div_(255).sub_(self.mean).div_(self.std)


class VisionTower(MegatronModule):
    """The units `vision.*` of one stage.

    The embedding (pixels, patches, class token, positions, first norm) lives where `vision.embed` does, a norm behind
    the last block where that block does; blocks are megatron-core's, tensor parallel, without a mask. Tokens stay whole
    on every tensor parallel rank.
    """

    def __init__(self, options: VisionOptions, image: ImageOptions, config: TransformerConfig, stage: Stage):
        super().__init__(config=config)
        self.options = options
        self.has_embedding = stage.has("vision.embed")
        device, dtype = backend.current().device, config.params_dtype
        if self.has_embedding:
            self.normalise = Normalise(image, device)
            self.patch_embedding = torch.nn.Conv2d(
                3,
                options.hidden_size,
                kernel_size=options.patch_size,
                stride=options.patch_size,
                bias=options.has_patch_bias,
                device=device,
                dtype=dtype,
            )
            if options.has_class_token:
                self.class_token = torch.nn.Parameter(torch.empty(options.hidden_size, device=device, dtype=dtype))
            self.position_embedding = torch.nn.Parameter(
                torch.empty(options.num_positions, options.hidden_size, device=device, dtype=dtype)
            )
            if options.has_pre_norm:
                self.pre_norm = backend.current().layers.norm(
                    config=config, hidden_size=options.hidden_size, eps=options.norm_eps
                )
        self.transformer: TransformerBlock | None = None
        if stage.vision_layers:
            self.transformer = TransformerBlock(
                config,
                TransformerBlockSubmodules(layer_specs=[layer_spec(AttnMaskType.no_mask)] * len(stage.vision_layers)),
                post_layer_norm=False,
                pre_process=True,
                post_process=False,
                vp_stage=stage.vp_stage,
            )
        self.post_norm: torch.nn.Module | None = None
        if options.has_post_norm and options.num_layers - 1 in stage.vision_layers:
            self.post_norm = backend.current().layers.norm(
                config=config, hidden_size=options.hidden_size, eps=options.norm_eps
            )

    def forward(self, x: Tensor) -> Tensor:
        """Pixels [I, 3, H, W] where the embedding lives, else hidden states [P, I, H] -> hidden states [P, I, H]."""
        if self.has_embedding:
            x = self.embed(x)
        if self.transformer is not None:
            x = self.transformer(hidden_states=keep_gradient_path(x, self.transformer), attention_mask=None)
        return x if self.post_norm is None else self.post_norm(x)

    def embed(self, pixels_I3HW: Tensor) -> Tensor:
        """Pixels [I, 3, H, W], as a `Batch` has them -> [P, I, H], class token first."""
        pixels_I3HW = self.normalise(pixels_I3HW).to(self.position_embedding.dtype)
        x_IPH = self.patch_embedding(pixels_I3HW).flatten(2).transpose(1, 2)
        if self.options.has_class_token:
            x_IPH = torch.cat([self.class_token.expand(x_IPH.size(0), 1, -1), x_IPH], dim=1)
        x_IPH = x_IPH + self.position_embedding
        if self.options.has_pre_norm:
            x_IPH = self.pre_norm(x_IPH)
        return x_IPH.transpose(0, 1).contiguous()


def select_features(x_PIH: Tensor, options: VisionOptions) -> Tensor:
    """Drop what the projector does not see: the first token, unless it is kept."""
    return x_PIH if options.keep_first_token else x_PIH[1:]
