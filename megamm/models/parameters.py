"""The parameters of a built stage under their canonical names: finding, filling, drawing, reading back, freezing.

Canonical names come from megatron-core itself (`sharded_state_dict` with global layer numbers), so the table of
megamm/weights and the built model cannot drift apart unnoticed.
"""

from collections.abc import Callable, Collection, Iterable

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from torch import Tensor
from torch.nn import Parameter

from megamm.config.frozen import VISUAL, is_frozen
from megamm.errors import CheckpointError
from megamm.models.layers import hyper_attention, modality_adaptive
from megamm.models.vlm import VLM
from megamm.parallel.groups import gather_over_tp
from megamm.weights.draw import draw as draw_tensor
from megamm.weights.keymap import Entry, KeyMap


def canonical_parameters(chunks: Iterable[VLM]) -> list[tuple[str, Parameter]]:
    """Canonical names and local parameters of all virtual stages of this rank.

    A tied embedding has two parameters under one name when `llm.embed` and `llm.head` lie in two virtual stages.
    """
    found: list[tuple[str, Parameter]] = []
    for chunk in chunks:
        parameters = dict(chunk.named_parameters())
        for local_name, sharded in chunk.sharded_state_dict().items():
            if local_name in parameters and isinstance(sharded, (ShardedTensor, ShardedTensorFactory)):
                found.append((sharded.key, parameters.pop(local_name)))
        if parameters:
            raise RuntimeError(f"parameters that megatron-core would not save: {sorted(parameters)}")
    return found


def mark_partitions(chunks: Iterable[VLM], keymap: KeyMap) -> None:
    """Say on each parameter which dimension tensor parallelism cuts, if any.

    megatron-core says so itself only where it also draws the weights. Unmarked, a slice counts as a copy that every
    rank has, and the global gradient norm leaves out all slices but the first.
    """
    for name, parameter in canonical_parameters(chunks):
        dim = keymap[name].partition_dim
        for attribute in ("tensor_model_parallel", "partition_dim", "partition_stride"):
            if hasattr(parameter, attribute):
                delattr(parameter, attribute)
        set_tensor_model_parallel_attributes(parameter, dim is not None, -1 if dim is None else dim, 1)


@torch.no_grad()
def fill(chunks: Iterable[VLM], keymap: KeyMap, read: Callable[[Entry], Tensor]) -> None:
    """Copy into every local parameter its slice of `read(entry)`, the global tensor of that entry."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    for name, parameter in canonical_parameters(chunks):
        entry = keymap[name]
        local = entry.slice(read(entry), rank, size)
        if local.shape != parameter.shape:
            raise CheckpointError(f"{name}: slice {tuple(local.shape)} for a parameter {tuple(parameter.shape)}")
        parameter.copy_(local)


def draw(chunks: Iterable[VLM], keymap: KeyMap, seed: int) -> None:
    """Fill every parameter at random, as weights/draw.py draws it."""
    fill(chunks, keymap, lambda entry: draw_tensor(entry.name, entry.shape, seed, entry.std))


def join(entry: Entry, local: Tensor) -> Tensor:
    """The global tensor of which this rank holds `local`; every tensor parallel rank must call it."""
    if entry.partition_dim is None:
        return local
    return entry.join(gather_over_tp(local))


def unit_of(name: str) -> str:
    """The unit of the flat list to which the parameter of a canonical name belongs; of a norm behind the tower's last
    layer, whose unit it shares, `vision.norm`; `words`, which has none of its own, is a guest in others."""
    part, *rest = name.split(".")
    if part in ("projector", "words"):
        return part
    if "layers" in rest:
        return f"{part}.layer.{rest[rest.index('layers') + 1]}"
    if rest[0] == "post_norm":
        return f"{part}.norm"
    return "llm.head" if part == "llm" and rest[0] != "embedding" else f"{part}.embed"


def freeze(chunks: Iterable[VLM], frozen: Collection[str]) -> None:
    """Stop training what `frozen` names, as `train.freeze` says it.

    Where nothing in front of a stage is trained any more, the stage will neither compute nor send a gradient for it.
    """
    chunks = list(chunks)
    for name, parameter in canonical_parameters(chunks):
        is_visual = modality_adaptive.is_visual_way(name) or hyper_attention.is_visual_way(name)
        if is_frozen(f"{unit_of(name)}.{VISUAL}" if is_visual else unit_of(name), frozen):
            parameter.requires_grad_(False)
    for chunk in chunks:
        chunk.sends_gradient = any(unit.is_trained(frozen) for unit in chunk.stage.earlier)
