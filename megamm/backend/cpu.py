"""The CPU backend: gloo, megatron-core's local layers, SDPA attention, torch's fused AdamW.

megatron-core 0.16.1 names CUDA in its ordinary path, even where no GPU is needed. `redirect_cuda_calls` sends
those calls to the CPU. It is ugly, so all of it stands here, each redirection with its reason and a test in
tests/backend/; none of it runs on a machine whose backend is the GPU.
"""

import contextlib
import functools
import importlib
import math
import resource
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from megamm.backend import Backend, LayerModules


def start() -> Backend:
    """Redirect megatron-core's CUDA calls and describe this machine."""
    redirect_cuda_calls()
    # megatron-core compiles small functions for fusion; on a CPU that costs a C++ compiler run each and gains nothing.
    torch.compiler.set_stance("force_eager")
    return Backend(
        name="cpu",
        device=torch.device("cpu"),
        collectives="gloo",
        layers=LayerModules(
            column_linear=ColumnParallelLinear,
            row_linear=RowParallelLinear,
            norm=Norm,
            core_attention=SdpaAttention,
        ),
        precisions=("fp32", "bf16"),
        config_flags=dict(
            use_cpu_initialization=True,
            bias_dropout_fusion=False,
            bias_activation_fusion=False,
            masked_softmax_fusion=False,
            apply_rope_fusion=False,
            gradient_accumulation_fusion=False,
            # Batched exchange pairs messages up crosswise on gloo, and freeing an output while gloo still sends it
            # corrupts it: with equal shapes silently.
            batch_p2p_comm=False,
            batch_p2p_sync=False,
            deallocate_pipeline_outputs=False,
        ),
        memory_bytes=lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        synchronize=lambda: None,
    )


class Norm(torch.nn.Module):
    """LayerNorm or RMSNorm over the last dimension, chosen by `config.normalization`, with sequence parallelism.

    megatron-core's torch norm refuses sequence parallelism; all it needs is that the parameters are marked, so that
    their gradients, each rank's from its part of the sequence, are summed over the tensor parallel group.
    The arithmetic is Hugging Face's: statistics in float32, cast back, then the weight.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__()
        self.eps = eps
        self.shape = (hidden_size,)
        if config.normalization not in ("LayerNorm", "RMSNorm"):
            raise ValueError(f"normalization must be LayerNorm or RMSNorm, not {config.normalization}")
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.bias = None
        if config.normalization == "LayerNorm":
            self.bias = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        for parameter in self.parameters():
            _replace(parameter, sequence_parallel=config.sequence_parallel)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., H] -> [..., H], same dtype."""
        if self.bias is not None:
            return F.layer_norm(x, self.shape, self.weight, self.bias, self.eps)
        x_float = x.float()
        x_float = x_float * torch.rsqrt(x_float.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x_float.to(x.dtype)


class SdpaAttention(torch.nn.Module):
    """Core attention on torch's scaled_dot_product_attention: grouped queries, causal or full, a causal one within a
    window (`config.window_size`), packed sequences too.

    Stands where megatron-core puts DotProductAttention, whose local version needs a CUDA buffer, repeats keys and
    values in memory, and refuses packed sequences.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ):
        super().__init__()
        if config.context_parallel_size != 1:
            raise ValueError("context parallelism needs the GPU backend")
        if attn_mask_type not in (AttnMaskType.causal, AttnMaskType.no_mask):
            raise ValueError(f"attention mask type {attn_mask_type} is neither causal nor no_mask")
        self.is_causal = attn_mask_type == AttnMaskType.causal
        self.reach: int | None = None
        """Positions before its own that a query sees; None: all."""
        if is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number):
            if not self.is_causal or config.window_size[1] != 0:
                raise ValueError(f"a window of {config.window_size} needs causal attention and nothing on the right")
            self.reach = config.window_size[0]
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """query [S, B, N, D], key and value [S, B, G, D] -> [S, B, N * D]; packed: [S, N, D] and [S, G, D] ->
        [S, 1, N * D], attention staying inside the segments of `packed_seq_params.cu_seqlens_q`.

        `attention_mask`, where given, is True where a query may not look, and replaces causal mask and window.
        """
        if attention_bias is not None:
            raise ValueError("attention bias is not supported by the CPU attention")
        if packed_seq_params is not None:
            bounds = packed_seq_params.cu_seqlens_q.tolist()
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
            parts = [
                self._attend(query[a:b], key[a:b], value[a:b], None)
                for a, b in zip(bounds, bounds[1:], strict=False)
                if b > a
            ]
            return torch.cat(parts)
        return self._attend(query, key, value, attention_mask)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None and self.reach is not None and len(query) > self.reach + 1:
            ones = torch.ones(len(query), len(key), dtype=torch.bool, device=query.device)
            mask = ones.triu(1) | ones.tril(-self.reach - 1)
        q_BNSD, k_BGSD, v_BGSD = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        context_BNSD = F.scaled_dot_product_attention(
            q_BNSD,
            k_BGSD,
            v_BGSD,
            attn_mask=None if mask is None else ~mask,
            is_causal=self.is_causal and mask is None,
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.scale,
            enable_gqa=q_BNSD.size(1) != k_BGSD.size(1),
        )
        return context_BNSD.permute(2, 0, 1, 3).flatten(2)


class FusedAdam(torch.optim.Optimizer):
    """AdamW with the interface of apex's FusedAdam, on torch's fused kernel.

    The step count lives in the parameter group, not in each parameter's state: megatron-core's distributed optimizer
    cannot load a fully reshardable checkpoint of torch's own AdamW ("step" is missing).
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
    ):
        if not (adam_w_mode and bias_correction):
            raise ValueError("this FusedAdam only does AdamW with bias correction")
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # apex's takes no closure either
        """One AdamW step on every parameter that has a gradient."""
        for group in self.param_groups:
            group["step"] = int(group.get("step", 0)) + 1
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p)
                    state["exp_avg_sq"] = torch.zeros_like(p)
            torch._fused_adamw_(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                [torch.tensor(float(group["step"])) for _ in params],
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )


class _NoStream:
    """Stands for a CUDA stream or event: on the CPU all work is already in order."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def __getattr__(self, _: str) -> Callable:
        return lambda *_, **__: self

    def __enter__(self) -> "_NoStream":
        return self

    def __exit__(self, *_: Any) -> None:
        return None


_FACTORIES = [
    "arange",
    "empty",
    "empty_like",
    "empty_strided",
    "full",
    "full_like",
    "linspace",
    "ones",
    "ones_like",
    "rand",
    "randint",
    "randn",
    "tensor",
    "zeros",
    "zeros_like",
]
_CPU = torch.device("cpu")


def _on_cpu(device: Any) -> Any:
    """`device` with CUDA replaced by CPU; anything else as it is."""
    is_cuda = isinstance(device, int) or (device is not None and torch.device(device).type == "cuda")
    return _CPU if is_cuda and not isinstance(device, bool) else device


def _redirect_factory(factory: Callable) -> Callable:
    @functools.wraps(factory)
    def on_cpu(*args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("device") is not None:
            kwargs["device"] = _on_cpu(kwargs["device"])
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return on_cpu


@functools.cache
def redirect_cuda_calls() -> None:
    """Make the places where megatron-core names CUDA unconditionally run on the CPU. Runs once per process.

    Nearly every redirected call would otherwise raise on a machine without a GPU. Two that would not: `Tensor.type()`
    without arguments names the CUDA tensor type, because optimizers compare that string, and there is one "device".
    """
    # Patched by name and not through a TorchFunctionMode: recomputation runs in the backward pass, without the mode.
    # `with torch.device(...)` knows the factories by identity and caches them: let it see the real ones first.
    torch.utils._device._device_constructors()
    # megatron-core hands functions to torch.compile as it is imported, and dynamo refuses the redirected ones.
    importlib.import_module("megatron.core.models.gpt")
    _replace(torch, **{name: _redirect_factory(getattr(torch, name)) for name in _FACTORIES})

    tensor_to, tensor_type = torch.Tensor.to, torch.Tensor.type

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args and isinstance(args[0], (str, torch.device)):
            args = (_on_cpu(args[0]), *args[1:])
        if kwargs.get("device") is not None:
            kwargs["device"] = _on_cpu(kwargs["device"])
        return tensor_to(self, *args, **kwargs)

    def type_(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return tensor_type(self, *args, **kwargs)
        return tensor_type(self).replace("torch.", "torch.cuda.", 1)

    def itself(self: Any, *_: Any, **__: Any) -> Any:
        return self

    def nothing(*_: Any, **__: Any) -> None:
        return None

    _replace(torch.Tensor, to=to, type=type_, cuda=itself, pin_memory=itself)
    _replace(torch.nn.Module, cuda=itself)
    _replace(
        torch.cuda,
        current_device=lambda: _CPU,
        set_device=nothing,
        device_count=lambda: 1,
        synchronize=nothing,
        empty_cache=nothing,
        Stream=_NoStream,
        Event=_NoStream,
        stream=lambda *_: contextlib.nullcontext(),
        current_stream=_NoStream,
        default_stream=_NoStream,
    )
    _replace(torch.cuda.nvtx, range_push=nothing, range_pop=nothing)

    # One generator serves as "CUDA" and CPU generator; the tracker's fork saves and restores its state.
    def get_state(*_: Any, **__: Any) -> Tensor:
        return torch.get_rng_state()

    def set_state(state: Tensor, *_: Any, **__: Any) -> None:
        torch.set_rng_state(state)

    # torch.manual_seed would call torch.cuda.manual_seed in turn.
    seed = torch.default_generator.manual_seed
    _replace(torch.cuda, get_rng_state=get_state, set_rng_state=set_state, manual_seed=seed, manual_seed_all=seed)
    _replace(torch.cuda.random, get_rng_state=get_state)
    from megatron.core.tensor_parallel import random as mcore_random

    _replace(mcore_random, _set_cuda_rng_state=set_state)

    # Transformer Engine and apex are absent: give the optimizer the same interface instead of torch's AdamW.
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    _replace(optimizer, Adam=FusedAdam, USING_PYTORCH_OPTIMIZER=False)
    _replace(distrib_optimizer, Adam=FusedAdam, HAVE_APEX_OR_TE=True, USING_APEX_OPTIMIZER=True)


def _replace(owner: Any, **replacements: Any) -> None:
    for name, value in replacements.items():
        setattr(owner, name, value)
