"""How one of our tensors is cut over the ranks of tensor parallelism, and joined again. Pure arithmetic.

The cuts are megatron's own: megatron slices `linear_qkv` evenly along dim 0 even where there are more ranks than
key/value groups, so `col` holds there too. Vocabulary padding lives here because it exists only for these cuts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

PARTITION_DIM: dict[str | None, int | None] = {None: None, "col": 0, "row": 1, "col2": 0, "vocab": 0}
"""Cut dimension by the name a Row uses. None: every rank holds the whole. `col`: dim 0. `row`: dim 1. `col2`: dim 0 of
two halves, each cut, so that a slice is [first_r; second_r]. `vocab`: dim 0 after padding."""


def slice_tensor(tensor: Tensor, tp: str | None, rank: int, size: int) -> Tensor:
    """What rank `rank` of `size` holds of `tensor`; a view where one is possible. ValueError: does not divide."""
    if tp == "col2":
        return torch.cat([slice_tensor(half, "col", rank, size) for half in _halves(tensor)])
    dim = PARTITION_DIM[tp]
    if dim is None:
        return tensor
    if tensor.shape[dim] % size:
        raise ValueError(f"dim {dim} of shape {tuple(tensor.shape)} does not divide by tensor parallel size {size}")
    return tensor.narrow(dim, rank * (tensor.shape[dim] // size), tensor.shape[dim] // size)


def join_slices(slices: Sequence[Tensor], tp: str | None) -> Tensor:
    """The whole tensor from the slices of all ranks in order; the inverse of `slice_tensor`."""
    if tp == "col2":
        firsts, seconds = zip(*(_halves(part) for part in slices), strict=True)
        return torch.cat([*firsts, *seconds])
    dim = PARTITION_DIM[tp]
    return slices[0] if dim is None else torch.cat(list(slices), dim=dim)


def _halves(tensor: Tensor) -> tuple[Tensor, Tensor]:
    if tensor.shape[0] % 2:
        raise ValueError(f"shape {tuple(tensor.shape)} has an odd number of rows and no halves")
    first, second = tensor.chunk(2)
    return first, second


def pad_vocab(tensor: Tensor, vocab: int, vocab_padded: int) -> Tensor:
    """Append zero rows: [vocab, ...] to [vocab_padded, ...]. ValueError: another number of rows."""
    if tensor.shape[0] != vocab:
        raise ValueError(f"{tensor.shape[0]} rows where the vocabulary has {vocab}")
    if vocab == vocab_padded:
        return tensor
    return torch.cat([tensor, tensor.new_zeros(vocab_padded - vocab, *tensor.shape[1:])])


def cut_vocab(tensor: Tensor, vocab: int, vocab_padded: int) -> Tensor:
    """Drop the rows that `pad_vocab` appended. ValueError: another number of rows."""
    if tensor.shape[0] != vocab_padded:
        raise ValueError(f"{tensor.shape[0]} rows where the padded vocabulary has {vocab_padded}")
    return tensor[:vocab]
