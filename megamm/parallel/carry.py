"""What crosses a stage boundary inside the llm: hidden states, and behind them the visual tokens where a later unit
reads these, too. Exactly one 3-dimensional tensor crosses, so they travel as extra rows of it."""

import torch
from torch import Tensor


def pack(x_SBH: Tensor, features_R1H: Tensor) -> Tensor:
    """Hidden states [S, B, H] and features [R, 1, H] -> [S * B + R, 1, H]."""
    return torch.cat([x_SBH.reshape(-1, 1, x_SBH.size(-1)), features_R1H])


def unpack(carried_X1H: Tensor, length: int, size: int) -> tuple[Tensor, Tensor]:
    """The way back; `length` (S, of this rank) and `size` (B) are known from the ids."""
    x, features_R1H = carried_X1H.split([length * size, carried_X1H.size(0) - length * size])
    return x.reshape(length, size, -1), features_R1H
