"""Picture bytes -> pixels as a vision tower sees them, before it normalises. Knows nothing of where bytes come from."""

import io
from dataclasses import dataclass
from typing import Literal

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from megamm.data.faults import SampleFault
from megamm.data.views import choose_anchor
from megamm.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
"""What Pillow may open. Its other readers are for nobody's training pictures, and some start other programs."""

MAX_PIXELS = 178_956_970
"""Pictures above this are refused from their header; Pillow's own limit, 0.5 GiB of RGB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageFormat:
    """What one vision tower takes in, and how many visual tokens come out of it."""

    size: int
    """Side of the square that enters the tower, in pixels."""
    mean: tuple[float, float, float]
    """Per channel, of values in 0..1: the colour of the padding."""
    aspect: Literal["pad", "stretch", "square"] = "pad"
    """`pad`: paste the picture on a square of the mean colour first. `stretch`: scale its shorter edge to the longer
    one first, as mPLUG-Owl2 does for inference. `square`: leave it to `resize`."""
    resize: Literal["shortest_edge_crop", "squash"] = "shortest_edge_crop"
    """CLIP scales the shorter edge to `size` and crops the centre; SigLIP scales both edges to `size`."""
    tokens: int
    """Visual tokens per picture."""


def decode(data: bytes) -> np.ndarray:
    """RGB, uint8 [H, W, 3]: what Pillow's `convert("RGB")` gives, EXIF orientation ignored as the authors do.

    Raises SampleFault (image_broken).
    """
    if _is_plain_jpeg(data):
        try:
            return simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=False, fastupsample=False, strict=True)
        except ValueError:
            pass  # Pillow decides what is an error: it forgives some warnings, never a truncated file
    return _decode_pillow(data)


def verify(data: bytes) -> None:
    """Raise SampleFault (image_broken) where `decode` would. Reads every coded bit of a JPEG, but at an eighth of the
    size: twice as fast as decoding."""
    if _is_plain_jpeg(data):
        try:
            eighth = {"min_height": 1, "min_width": 1, "min_factor": 8}
            simplejpeg.decode_jpeg(data, "GRAY", fastdct=True, fastupsample=True, strict=True, **eighth)
            return
        except ValueError:
            pass  # as in `decode`
    _decode_pillow(data)


def verify_header(data: bytes) -> None:
    """Raise SampleFault (image_broken) for what has no picture's header, or one of too many pixels. What is damaged or
    cut short behind it is not found."""
    if _is_plain_jpeg(data):
        return
    width, height = picture_size(data)
    if width * height > MAX_PIXELS:
        raise SampleFault("image_broken", f"{width} x {height} pixels, more than {MAX_PIXELS}")


def reencode(data: bytes, max_side: int | None, quality: int | None) -> bytes:
    """The picture with its longer side at most `max_side` pixels, as a JPEG of `quality` (1 to 100; 95 where only its
    size was asked for). With both None, and where there is nothing to do, the very bytes.

    Raises SampleFault (image_broken).
    """
    if max_side is None and quality is None:
        return data
    rgb = decode(data)
    height, width = rgb.shape[:2]
    scale = min(1.0, max_side / max(height, width)) if max_side else 1.0
    if scale == 1.0 and quality is None:
        return data
    picture = Image.fromarray(rgb)
    if scale < 1.0:
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality or 95)
    return file.getvalue()


def picture_size(data: bytes) -> tuple[int, int]:
    """Width and height in pixels, from the header alone; EXIF orientation ignored, as by `decode`.

    Raises SampleFault (image_broken)."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            return picture.size
    except Exception as error:  # as in `_decode_pillow`
        raise SampleFault("image_broken", f"{type(error).__name__}: {error}") from error


def to_views(rgb: np.ndarray, image_format: ImageFormat, num_views: int) -> Tensor:
    """uint8 [H, W, 3] -> uint8 [num_views, 3, size, size]: one view is the whole picture, more are the tiles of the
    grid that `choose_anchor` chooses, row after row, and the whole picture behind them.

    Raises DataError where the grid has another number of tiles, or pictures are padded, which have no shape left."""
    whole = to_pixels(rgb, image_format)
    if num_views == 1:
        return whole[None]
    if image_format.aspect == "pad":
        raise DataError("data.aspect: pad cannot go with pictures that are cut into tiles; use square")
    height, width, _ = rgb.shape
    size = image_format.size
    rows, columns = choose_anchor(width, height, size)
    if rows * columns + 1 != num_views:
        raise DataError(f"{num_views} views where {rows} x {columns} tiles and the whole are meant; preprocess again")
    scaled_3HW = _resized(_channels_first(rgb), rows * size, columns * size)
    tiles_3RHCW = scaled_3HW.view(3, rows, size, columns, size)
    return torch.cat([tiles_3RHCW.permute(1, 3, 0, 2, 4).flatten(0, 1), whole[None]])


def to_pixels(rgb: np.ndarray, image_format: ImageFormat) -> Tensor:
    """uint8 [H, W, 3] -> uint8 [3, size, size], channels interleaved in memory as they were. What the published
    processors normalise after LLaVA's expand2square: they resize with Pillow's bicubic on 8-bit values; on OwlEval's
    pictures the mean absolute difference is at most 0.2 levels of 255, and mostly 0.005."""
    size = image_format.size
    height, width, _ = rgb.shape
    picture_3HW = _channels_first(rgb)
    if image_format.aspect == "pad" and height != width:
        return _resized_in_square(picture_3HW, image_format)
    if image_format.aspect == "stretch":
        height = width = max(height, width)
        picture_3HW = _resized(picture_3HW, height, width)
    if image_format.resize == "squash":
        return _resized(picture_3HW, size, size)
    short = min(height, width)
    height, width = size * height // short, size * width // short
    top, left = (height - size) // 2, (width - size) // 2
    return _resized(picture_3HW, height, width)[:, top : top + size, left : left + size]


def _resized_in_square(picture_3HW: Tensor, image_format: ImageFormat) -> Tensor:
    """The picture in the middle of a square of the mean colour, scaled to `size`, uint8.

    The filter is one pass along each edge, and no row of the square mixes picture and padding along the longer edge. So
    that pass comes first, over the picture alone; the square, of which only the shorter edge is padded, comes after."""
    size = image_format.size
    _, height, width = picture_3HW.shape
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    colour = torch.tensor([int(255 * mean) for mean in image_format.mean], dtype=torch.uint8)
    rows, columns = (side, size) if width == side else (size, side)
    square_HW3 = colour.repeat(columns).expand(rows, -1).clone().view(rows, columns, 3)  # row by row: 10 times faster
    if width == side:
        square_HW3[top : top + height] = _resized(picture_3HW, height, size).permute(1, 2, 0)
    else:
        square_HW3[:, left : left + width] = _resized(picture_3HW, size, width).permute(1, 2, 0)
    return _resized(square_HW3.permute(2, 0, 1), size, size)


def _channels_first(rgb: np.ndarray) -> Tensor:
    """A view [3, H, W]; a copy where the array is read-only, which torch does not know."""
    return torch.from_numpy(rgb if rgb.flags.writeable else rgb.copy()).permute(2, 0, 1)


def _resized(picture_3HW: Tensor, height: int, width: int) -> Tensor:
    """Pillow's bicubic, uint8, by torch's vectorised port of it. Interleaved channels stay interleaved."""
    # The batch dimension has to be made in front of interleaved channels: else torch takes them apart and together.
    picture_1HW3 = picture_3HW.permute(1, 2, 0)[None]
    return F.interpolate(picture_1HW3.permute(0, 3, 1, 2), size=(height, width), mode="bicubic", antialias=True)[0]


def _is_plain_jpeg(data: bytes) -> bool:
    """Whether libjpeg alone gives Pillow's pixels: CMYK and YCCK need its colour conversion."""
    if not simplejpeg.is_jpeg(data):
        return False
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return False
    if height * width > MAX_PIXELS:
        raise SampleFault("image_broken", f"{width} x {height} pixels, more than {MAX_PIXELS}")
    return colorspace in ("YCbCr", "Gray")


def _decode_pillow(data: bytes) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            return np.asarray(picture.convert("RGB"))
    except Exception as error:  # whatever a broken file makes one of Pillow's readers raise is a fault of the file
        raise SampleFault("image_broken", f"{type(error).__name__}: {error}") from error
