"""A tower's learned positions for pictures of another size."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def _first_and_grid(rows: int) -> tuple[int, int]:
    """Rows in front of the patches, such as a class token's, and patches along a side. ValueError: more than one such
    row, or no square of patches."""
    for first in (0, 1):
        grid = math.isqrt(rows - first)
        if grid * grid + first == rows:
            return first, grid
    raise ValueError(f"{rows} positions are no square of patches, with or without a class token")


def resize_positions(positions: Tensor, shape: tuple[int, ...]) -> Tensor:
    """[..., rows, H] -> `shape`, [..., other rows, H]: the patches' positions interpolated (bicubic, in float32), the
    class token's as it is. ValueError: shapes that are no positions of one model."""
    first, old = _first_and_grid(positions.shape[-2])
    other_first, new = _first_and_grid(shape[-2])
    if first != other_first or (*positions.shape[:-2], positions.shape[-1]) != (*shape[:-2], shape[-1]):
        raise ValueError(f"positions {tuple(positions.shape)} cannot become {shape}")
    rows = positions.reshape(-1, positions.shape[-1])
    grid = rows[first:].float().T.reshape(1, -1, old, old)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    patches = grid.reshape(rows.shape[1], -1).T.to(positions.dtype)
    return torch.cat([rows[:first], patches]).reshape(shape)
