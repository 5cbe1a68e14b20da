"""Tiny random datasets in megamm's own format."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from megamm.batch import IMAGE
from megamm.data.indexed import Writer


def random_dataset(
    prefix: str | Path,
    *,
    num_samples: int,
    vocab_size: int,
    family: str = "llava",
    max_length: int = 24,
    max_images: int = 2,
    seed: int = 0,
    placeholder: Sequence[int] | None = None,
) -> None:
    """Write documents of 8 to `max_length` random ids with 0 to `max_images` random small PNG pictures each.

    Ids below 3 are left out (unk, bos, eos by custom); the second half of every document is target.
    `placeholder`: the ids that stand for a picture, for a family whose visual tokens are no part of the sequence.
    """
    draw = np.random.RandomState(seed)
    with Writer(prefix) as writer:
        for _ in range(num_samples):
            ids = draw.randint(3, vocab_size, size=draw.randint(8, max_length + 1)).astype(np.int32)
            num_images = draw.randint(0, max_images + 1)
            ids[1 : 1 + num_images] = IMAGE
            pictures = [png(draw.randint(0, 256, size=(20, 30, 3), dtype=np.uint8)) for _ in range(num_images)]
            writer.add(ids, pictures, np.array([[len(ids) // 2, len(ids)]], dtype=np.int32))
        writer.finish({"family": family} | ({} if placeholder is None else {"placeholder": list(placeholder)}))


def png(rgb: np.ndarray) -> bytes:
    """A picture, uint8 [H, W, 3], as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, format="PNG")
    return buffer.getvalue()
