"""From our options and the backend to megatron-core's TransformerConfig and layer specs, the one caller of these."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.activations import quick_gelu
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer import ModuleSpec, TransformerConfig, TransformerLayer, TransformerLayerSubmodules
from megatron.core.transformer.attention import CrossAttentionSubmodules, SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from megamm import backend
from megamm.config.schema import Loss
from megamm.models.layers.hyper_attention import HyperAttention, HyperAttentionSubmodules, HyperLayer
from megamm.models.layers.modality_adaptive import (
    ModalityAdaptiveAttention,
    ModalityAdaptiveLayer,
    ModalityAdaptiveNorm,
)
from megamm.models.layers.parallel_residual import ParallelResidualLayer
from megamm.models.options import HyperOptions, LlmOptions, ProjectorOptions, VisionOptions, VlmOptions
from megamm.parallel.placement import Layout


@dataclass(frozen=True, kw_only=True, slots=True)
class Build:
    """How a model is built here: what `parallel` and `train` of the config say about its modules."""

    tp: int = 1
    sequence_parallel: bool = False
    layout: Layout
    precision: backend.Precision = "fp32"
    recompute: Literal["none", "full"] = "none"
    loss: Loss = field(default_factory=Loss)

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the parameters and of what crosses a stage boundary."""
        return torch.float32 if self.precision == "fp32" else torch.bfloat16


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """The tanh approximation of GELU, `gelu_pytorch_tanh` and `gelu_new` in Hugging Face's words."""
    return F.gelu(x, approximate="tanh")


_ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu_tanh": gelu_tanh, "gelu": F.gelu, "silu": F.silu}


def _common(build: Build) -> dict[str, Any]:
    """The fields that every part's TransformerConfig shares."""
    layout = build.layout
    flags: dict[str, Any] = {
        **backend.current().config_flags,
        "tensor_model_parallel_size": build.tp,
        "pipeline_model_parallel_size": layout.pp,
        "pipeline_dtype": build.dtype,
        "params_dtype": build.dtype,
        "bf16": build.dtype == torch.bfloat16,
        # Stages exchange shapes, so micro-batches may differ in length; refused for the default MoE dispatcher even in
        # dense models.
        "variable_seq_lengths": True,
        "moe_token_dispatcher_type": "alltoall",
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        # Weights are loaded, or drawn by their names (models/parameters.py), never in order of construction.
        "perform_initialization": False,
        # Keys with global layer numbers (sic).
        "hetereogenous_dist_checkpoint": True,
        "calculate_per_token_loss": True,
    }
    if layout.virtual > 1:
        flags.update(virtual_pipeline_model_parallel_size=layout.virtual, overlap_p2p_comm=True)
    if build.recompute == "full":
        flags.update(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    return flags


def _fp8(build: Build) -> dict[str, Any]:
    """Delayed scaling, for the llm only: FP8 wants token counts that divide by 16, and 577 or 729 do not."""
    if build.precision != "fp8":
        return {}
    return dict(fp8="hybrid", fp8_recipe="delayed", fp8_amax_history_len=16, fp8_amax_compute_algo="max")


def _pipeline(layout: Layout, part: str) -> dict[str, Any]:
    if layout.pp == 1:
        return {}
    return {"pipeline_model_parallel_layout": PipelineParallelLayerLayout(layout.mcore_layout(part), layout.pp)}


def llm_config(options: LlmOptions, build: Build) -> TransformerConfig:
    """The decoder's config; its pipeline fields are those of the whole model."""
    common = _common(build)
    # megatron-core fuses the activation of a gated MLP; the tanh GELU it refuses.
    common["bias_activation_fusion"] = common["bias_activation_fusion"] and options.is_gated
    return TransformerConfig(
        **common,
        **_pipeline(build.layout, "llm"),
        **_fp8(build),
        num_layers=options.num_layers,
        hidden_size=options.hidden_size,
        ffn_hidden_size=options.ffn_size,
        num_attention_heads=options.num_heads,
        num_query_groups=options.num_groups,
        kv_channels=options.head_dim,
        normalization=options.norm,
        layernorm_epsilon=options.norm_eps,
        activation_func=_ACTIVATIONS[options.activation],
        gated_linear_unit=options.is_gated,
        add_bias_linear=options.has_bias,
        add_qkv_bias=options.has_qkv_bias,
        # (to the left, to the right), the query's own position not counted.
        window_size=None if options.window is None else (options.window - 1, 0),
        sequence_parallel=build.sequence_parallel,
    )


def vision_config(options: VisionOptions, build: Build) -> TransformerConfig:
    """The tower's config. Its pipeline layout is derived from the same cut, so that layer numbers are global here, too.
    Sequence parallel is off: 577 and 729 tokens divide by nothing."""
    return TransformerConfig(
        **{**_common(build), "bias_activation_fusion": False},
        **_pipeline(build.layout, "vision"),
        num_layers=options.num_layers,
        hidden_size=options.hidden_size,
        ffn_hidden_size=options.ffn_size,
        num_attention_heads=options.num_heads,
        normalization="LayerNorm",
        layernorm_epsilon=options.norm_eps,
        activation_func=_ACTIVATIONS[options.activation],
        add_bias_linear=True,
        add_qkv_bias=True,
        sequence_parallel=False,
    )


def projector_config(options: ProjectorOptions, build: Build) -> TransformerConfig:
    """What the projector's modules read: sizes, dtype, tensor parallelism. It has no layers of megatron-core's."""
    common = {**_common(build), "bias_activation_fusion": False, "pipeline_model_parallel_size": 1}
    for name in ("virtual_pipeline_model_parallel_size", "overlap_p2p_comm", "variable_seq_lengths", "pipeline_dtype"):
        common.pop(name, None)
    return TransformerConfig(
        **common,
        num_layers=1,
        hidden_size=options.in_size if options.num_heads else options.out_size,
        num_attention_heads=options.num_heads or build.tp,
        kv_channels=options.head_dim or None,
        sequence_parallel=False,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class PartConfigs:
    """One TransformerConfig per part, shared by all virtual stages of a rank."""

    vision: TransformerConfig
    projector: TransformerConfig
    llm: TransformerConfig

    @classmethod
    def of(cls, options: VlmOptions, build: Build) -> "PartConfigs":
        """The configs of every part of a model."""
        return cls(
            vision=vision_config(options.vision, build),
            projector=projector_config(options.projector, build),
            llm=llm_config(options.llm, build),
        )


def layer_spec(attn_mask_type: AttnMaskType, parallel_residual: bool = False) -> ModuleSpec:
    """One pre-norm transformer layer on the backend's modules; causal for a decoder, no_mask for a tower.

    Local layers keep their norm in a module of its own; the map gives it the name that Transformer Engine's fused
    layers write, so that one checkpoint serves both backends. With `parallel_residual` attention and MLP share the
    input norm, which then is a module of its own everywhere and keeps its name.
    """
    layers = backend.current().layers
    fused = None if parallel_residual else layers.norm_column_linear
    return ModuleSpec(
        module=ParallelResidualLayer if parallel_residual else TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=IdentityOp if fused else layers.norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": attn_mask_type},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=fused or layers.column_linear,
                    core_attention=layers.core_attention,
                    linear_proj=layers.row_linear,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=IdentityOp if fused or parallel_residual else layers.norm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(linear_fc1=fused or layers.column_linear, linear_fc2=layers.row_linear),
            ),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={}
            if fused or parallel_residual
            else {
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )


def decoder_layer_spec(options: LlmOptions, layer: int) -> ModuleSpec:
    """Layer number `layer` of a decoder, counted from 0 over all stages."""
    if options.is_modality_adaptive:
        return modality_adaptive_layer_spec()
    spec = layer_spec(AttnMaskType.causal, options.has_parallel_residual)
    if options.hyper is None or layer not in options.hyper.layers:
        return spec
    return hyper_layer_spec(spec, options.hyper)


def hyper_layer_spec(spec: ModuleSpec, hyper: HyperOptions) -> ModuleSpec:
    """The layer of `spec`, made to read the visual tokens, too. Its first norm stands alone on every backend: text and
    visual tokens go through it on their way to two linears."""
    layers = backend.current().layers
    attention = HyperAttentionSubmodules(
        linear_qkv=layers.column_linear,
        core_attention=layers.core_attention,
        linear_proj=layers.row_linear,
        linear_image_kv=layers.column_linear,
    )
    first_norm = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    return ModuleSpec(
        module=HyperLayer,
        submodules=replace(
            spec.submodules,
            input_layernorm=layers.norm,
            self_attention=ModuleSpec(
                module=HyperAttention,
                params={"attn_mask_type": AttnMaskType.causal, "hyper": hyper},
                submodules=attention,
            ),
            sharded_state_dict_keys_map=spec.submodules.sharded_state_dict_keys_map | first_norm,
        ),
    )


def modality_adaptive_layer_spec() -> ModuleSpec:
    """A decoder layer with norms, keys and values twice. Its norms are never fused into the linears behind them, for
    which way a token goes is decided between the two."""
    layers = backend.current().layers
    norm = ModuleSpec(module=ModalityAdaptiveNorm, params={"norm": layers.norm})
    return ModuleSpec(
        module=ModalityAdaptiveLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=ModalityAdaptiveAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=CrossAttentionSubmodules(
                    linear_q=layers.column_linear,
                    linear_kv=layers.column_linear,
                    core_attention=layers.core_attention,
                    linear_proj=layers.row_linear,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(linear_fc1=layers.column_linear, linear_fc2=layers.row_linear),
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )
