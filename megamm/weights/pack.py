"""How the tensors of Hugging Face become one tensor of ours, and back: exact inverse pairs of pure functions.

Each function knows no names and works on meta tensors too, so that shapes can be told without reading. What is cut over
ranks is shard.py's business.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class HeadCounts(Protocol):
    """The sizes that packing needs beside the tensors."""

    @property
    def heads(self) -> int: ...

    @property
    def groups(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Packing:
    """A pair of inverse functions between `num_hf` tensors of Hugging Face and one of ours."""

    num_hf: int
    pack: Callable[[list[Tensor], HeadCounts], Tensor]
    unpack: Callable[[Tensor, HeadCounts], list[Tensor]]


def _pack_same(tensors: list[Tensor], sizes: HeadCounts) -> Tensor:
    return tensors[0]


def _unpack_same(tensor: Tensor, sizes: HeadCounts) -> list[Tensor]:
    return [tensor]


def _pack_cat2(tensors: list[Tensor], sizes: HeadCounts) -> Tensor:
    if tensors[0].shape != tensors[1].shape:
        raise ValueError("the two halves differ in shape")
    return torch.cat(tensors)


def _unpack_cat2(tensor: Tensor, sizes: HeadCounts) -> list[Tensor]:
    if tensor.shape[0] % 2:
        raise ValueError("an odd number of rows has no halves")
    return list(tensor.chunk(2))


def _pack_qkv(tensors: list[Tensor], sizes: HeadCounts) -> Tensor:
    query, key, value = tensors
    if query.shape[0] % sizes.heads or key.shape[0] * sizes.heads != query.shape[0] * sizes.groups:
        raise ValueError(f"rows do not fit {sizes.heads} query heads and {sizes.groups} key/value groups")
    if key.shape != value.shape:
        raise ValueError("key and value differ in shape")
    grouped = [tensor.reshape(sizes.groups, -1, *tensor.shape[1:]) for tensor in tensors]
    return torch.cat(grouped, dim=1).flatten(0, 1)


def _unpack_qkv(tensor: Tensor, sizes: HeadCounts) -> list[Tensor]:
    head_width, rest = divmod(tensor.shape[0], sizes.heads + 2 * sizes.groups)
    if rest:
        raise ValueError(f"rows do not fit {sizes.heads} query heads and {sizes.groups} key/value groups")
    queries = sizes.heads // sizes.groups * head_width
    grouped = tensor.reshape(sizes.groups, -1, *tensor.shape[1:])
    return [part.flatten(0, 1) for part in grouped.split([queries, head_width, head_width], dim=1)]


def _pack_kv(tensors: list[Tensor], sizes: HeadCounts) -> Tensor:
    key, value = tensors
    if key.shape != value.shape or key.shape[0] % sizes.groups:
        raise ValueError(f"key and value differ in shape, or their rows do not fit {sizes.groups} key/value groups")
    return torch.cat([x.reshape(sizes.groups, -1, *x.shape[1:]) for x in tensors], dim=1).flatten(0, 1)


def _unpack_kv(tensor: Tensor, sizes: HeadCounts) -> list[Tensor]:
    if tensor.shape[0] % (2 * sizes.groups):
        raise ValueError(f"rows do not fit {sizes.groups} key/value groups")
    grouped = tensor.reshape(sizes.groups, -1, *tensor.shape[1:])
    return [part.flatten(0, 1) for part in grouped.chunk(2, dim=1)]


def _pack_kv_fused(tensors: list[Tensor], sizes: HeadCounts) -> Tensor:
    return _pack_kv(_unpack_cat2(tensors[0], sizes), sizes)


def _unpack_kv_fused(tensor: Tensor, sizes: HeadCounts) -> list[Tensor]:
    return [torch.cat(_unpack_kv(tensor, sizes))]


def _leading(ones: int) -> Packing:
    """Of Hugging Face's tensor the leading dimensions, each of size 1, left out."""

    def pack(tensors: list[Tensor], sizes: HeadCounts) -> Tensor:
        if set(tensors[0].shape[:ones]) != {1}:
            raise ValueError(f"the first {ones} dimensions must be 1")
        return tensors[0].flatten(0, ones)

    def unpack(tensor: Tensor, sizes: HeadCounts) -> list[Tensor]:
        return [tensor.reshape(*(1,) * ones, *tensor.shape)]

    return Packing(1, pack, unpack)


def _pack_qkv_fused(tensors: list[Tensor], sizes: HeadCounts) -> Tensor:
    head_width, rest = divmod(tensors[0].shape[0], sizes.heads + 2 * sizes.groups)
    if rest:
        raise ValueError(f"rows do not fit {sizes.heads} query heads and {sizes.groups} key/value groups")
    key_rows = sizes.groups * head_width
    return _pack_qkv(list(tensors[0].split([sizes.heads * head_width, key_rows, key_rows])), sizes)


def _unpack_qkv_fused(tensor: Tensor, sizes: HeadCounts) -> list[Tensor]:
    return [torch.cat(_unpack_qkv(tensor, sizes))]


PACKINGS: dict[str, Packing] = {
    "same": Packing(1, _pack_same, _unpack_same),
    "cat2": Packing(2, _pack_cat2, _unpack_cat2),
    "qkv": Packing(3, _pack_qkv, _unpack_qkv),
    "qkv_fused": Packing(1, _pack_qkv_fused, _unpack_qkv_fused),
    "kv": Packing(2, _pack_kv, _unpack_kv),
    "kv_fused": Packing(1, _pack_kv_fused, _unpack_kv_fused),
    "lead1": _leading(1),
    "lead2": _leading(2),
}
"""By the name a Row uses. `same`: one tensor as it is. `cat2`: [first; second] along dim 0, such as [gate; up]. `qkv`:
query [N*D, ...], key and value [G*D, ...] to megatron's [G * (N/G + 2) * D, ...]: per group its queries, its key, its
value (N heads, G key/value groups, D head width); weights and biases alike. `qkv_fused`: the same from one tensor of
all queries, then all keys, then all values. `kv`, `kv_fused`: the same without queries. `lead1`, `lead2`: [1, ...] or
[1, 1, ...] to [...]."""
