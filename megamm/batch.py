"""What the data side hands to the model side: one sample, and one micro-batch of them.

Shape legend, used in every tensor name of megamm: S sequence, B micro-batch, H width, N heads, G key/value groups,
D head width, V vocabulary, I images, P patches (visual tokens) per image, Q queries, K placed visual tokens, M most
images of a row.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

IMAGE = -200
"""Id that stands for one visual token in expanded ids, and for one whole image in stored ids. Never embedded."""

IGNORE = -100
"""Label of a position that carries no loss."""


@dataclass(kw_only=True, slots=True)
class Sample:
    """One conversation, markers already expanded to one IMAGE id per visual token, already truncated."""

    ids_S: Tensor
    """int64 [S]; IMAGE where a visual token is placed."""
    labels_S: Tensor
    """int64 [S]; the id itself where it is a target, IGNORE elsewhere. Not shifted."""
    pixels_I3HW: Tensor | None
    """uint8 [I, 3, H, W], in order of the markers; I may be 0. vision.embed normalises them. A floating-point tensor is
    normalised already, as in a verification case. None on ranks that run no vision.embed."""
    num_images: int
    """Images whose tokens begin inside the kept part of the sequence (known on ranks without pixels, too)."""
    starts_I: Tensor | None = None
    """int64 [num_images]; index into `ids_S` of the first token that stands for each image, where these are ordinary
    tokens. None: where its IMAGE ids begin."""


@dataclass(kw_only=True, slots=True)
class Batch:
    """One micro-batch: a sample per row, right padded to a common length, or several samples packed into one row. Every
    rank has every field but the pixels."""

    ids_BS: Tensor
    """int64 [B, S]; IMAGE where a visual token is placed, the pad id behind the end."""
    targets_BS: Tensor
    """int64 [B, S]; the id that this position must predict (labels shifted left by one), IGNORE where there is none."""
    positions_BS: Tensor
    """int64 [B, S]; position of each token in its own sample."""
    pixels_I3HW: Tensor | None
    """uint8 [I, 3, H, W], or floating-point as in a sample; at least one picture: a batch without images carries one
    blank picture that is placed nowhere, so that every parameter runs on every rank. None on ranks that run no
    vision.embed."""
    slots_K: Tensor
    """int64 [K]; index into the flattened [B * S] positions of each placed visual token."""
    rows_K: Tensor
    """int64 [K]; index into the flattened [I * P] visual tokens of the row that is written there."""
    starts_BM: Tensor
    """int64 [B, M], M at least 1; index into the row of the first token that stands for each of its images, and S where
    a row has fewer. Images are counted row after row, so this also says whose they are."""
    num_images: int
    """Real images, blank ones not counted."""
    num_tokens: int
    """Tokens that are not padding, visual tokens included."""
    cu_seqlens: Tensor | None = None
    """int32 [samples + 1], of a packed row: where each sample begins, and the last one ends; padding is one more.
    No token sees one of another sample. None: every row is one sample."""
    max_seqlen: int | None = None
    """Tokens of the longest sample of a packed row."""

    def map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """The batch with `function` applied to every tensor."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        values |= {name: function(x) for name, x in values.items() if isinstance(x, Tensor)}
        return Batch(**values)

    def pin_memory(self) -> "Batch":
        """The batch in pinned memory; torch's DataLoader calls this."""
        return self.map(lambda x: x.pin_memory())
