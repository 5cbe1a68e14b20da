"""The switch between CPU and GPU. The only folder where cuda, nccl or transformer_engine may be named.

`start` chooses once per process; everybody else asks `current()` and reads fields. No code outside this folder
branches on a backend's name: where a caller would want to, the difference becomes a field of `Backend`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from megamm.errors import MegammError

Precision = Literal["fp32", "bf16", "fp8"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerModules:
    """The module classes that a transformer layer is built of; all take megatron-core's constructor arguments."""

    column_linear: type
    row_linear: type
    norm: type
    core_attention: type
    norm_column_linear: type | None = None
    """A column-parallel linear that normalises its input itself. None: the layer has a norm of its own in front."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Backend:
    """Everything that differs between a machine with and without a GPU."""

    name: Literal["cpu", "gpu"]
    device: torch.device
    collectives: Literal["gloo", "nccl"]
    layers: LayerModules
    precisions: tuple[Precision, ...]
    """What `check_precision` accepts here."""
    config_flags: dict[str, Any] = field(default_factory=dict)
    """Fields of every TransformerConfig: initialisation, fusions, and how stages exchange tensors."""
    overlap_gradient_reduction: bool = False
    """Reduce gradients bucket by bucket while the backward pass runs."""
    gradient_bucket_size: int | None = None
    """Parameters per bucket where the reduction overlaps; None: megatron-core's choice."""
    pins_memory: bool = False
    """Whether batches wait in pinned memory, so that their copies overlap with compute."""
    memory_bytes: Callable[[], int]
    """Peak memory of this process on its device since the start, in bytes."""
    synchronize: Callable[[], None]
    """Wait for all work queued on the device."""

    def check_precision(self, precision: Precision) -> None:
        """Raise MegammError when this machine cannot compute in `precision`. megatron-core itself ignores FP8 flags
        silently where Transformer Engine is missing."""
        if precision not in self.precisions:
            raise MegammError(
                f"train.precision {precision} cannot run on the {self.name} backend of this machine; it has: "
                f"{', '.join(self.precisions)}. FP8 needs an NVIDIA GPU of compute capability 8.9 or newer and "
                "Transformer Engine (pip install 'megamm[gpu]')."
            )


_current: Backend | None = None


def start(name: Literal["auto", "cpu", "gpu"] = "auto", local_rank: int = 0) -> Backend:
    """Choose the backend of this process; the first call in every `main`.

    `auto` takes the GPU when torch sees one. Asking for another backend later is an error: modules were built for the
    first. Raises MegammError when a GPU is asked for and there is none.
    """
    global _current
    chosen = name if name != "auto" else ("gpu" if torch.cuda.is_available() else "cpu")
    if _current is not None:
        if _current.name != chosen:
            raise MegammError(f"backend {chosen} was asked for, but this process already runs on {_current.name}")
        return _current
    if chosen == "gpu":
        from megamm.backend import gpu

        _current = gpu.start(local_rank)
    else:
        from megamm.backend import cpu

        _current = cpu.start()
    return _current


def current() -> Backend:
    """The backend of this process. Raises RuntimeError before `start`: that is a mistake in our code."""
    if _current is None:
        raise RuntimeError("megamm.backend.start() has not been called in this process")
    return _current


def seed_ranks(seed: int) -> None:
    """Seed this rank's generators: one state that tensor parallel ranks share and one that differs between them.

    Needs the model parallel groups.
    """
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
