"""Pictures and videos as views: a picture cut into tiles beside itself whole, a video as frames, and the text that
announces them. Knows sizes and text, no pixels.

mPLUG-Owl3's adaptive cropping and frame choice: arXiv 2408.04840 and the authors' released processor.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megamm.data.faults import SampleFault
from megamm.data.text import Turn

VIDEO_MARKER = "<video>"
"""Text that stands for a video in a conversation."""

ANCHORS = ((2, 2), (1, 3), (1, 4), (3, 1), (4, 1), (2, 3), (3, 2))
"""Rows and columns of tiles that a picture may be cut into, at most 6; of equally good ones the first is taken. None is
(1, 1): where pictures are cut, every one is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewRules:
    """What becomes of the pictures and videos of a source; plain values, written into PREFIX.json."""

    cut: Literal["none", "single", "all"] = "none"
    """Which still pictures are cut into tiles: none, the only one of a sample, or all; none beside a video."""
    text: Literal["v2", "v3"] = "v2"
    """How tiles and frames are announced, by the authors' names: `v2` until October 2024, `v3` since."""
    tile_size: int = 384
    """Side of a tile in pixels, the tower's: it has a say in how a picture is cut."""
    max_frames: int = 16
    """Frames of a video."""
    max_views: int | None = None
    """Views of a sample, tiles and frames counted; one with more is a fault. None: no limit."""


def choose_anchor(width: int, height: int, tile_size: int) -> tuple[int, int]:
    """Rows and columns of tiles for a picture of that size in pixels: the grid that is most like it in shape, and then
    in size."""

    def overlap(box: tuple[int, int], other: tuple[int, int]) -> float:
        common = min(box[0], other[0]) * min(box[1], other[1])
        return common / (box[0] * box[1] + other[0] * other[1] - common + 1e-5)

    def score(anchor: tuple[int, int]) -> float:
        box = (anchor[1] * tile_size, anchor[0] * tile_size)
        same_width = (box[0], int(height / width * box[0]))
        return 100 * overlap(box, same_width) + overlap(box, (width, height))

    return max(ANCHORS, key=score)


def tiles_text(rows: int, columns: int, style: str, marker: str) -> str:
    """What stands for a picture cut into tiles, then whole: a marker per view."""
    if style == "v2":
        text = "\n".join(
            " ".join(f"subimg({i},{j}){marker}" for j in range(1, columns + 1)) for i in range(1, rows + 1)
        )
        return f"Cut to {rows} rows {columns} columns with a global view\n{text}\nglobal_view{marker}"
    text = "\n".join(" ".join([marker] * columns) for _ in range(rows))
    return f"<|start_cut|>{rows}*{columns}\n{text}\n{marker}<|end_cut|>"


def frames_text(num_frames: int, style: str, marker: str) -> str:
    """What stands for a video: a marker per frame."""
    frames = marker * num_frames
    return frames if style == "v2" else f"<|start_video_frame|>{frames}<|end_video_frame|>"


def choose_frames(num_frames: int, frames_per_s: float, max_frames: int) -> list[int]:
    """Numbers of the frames that stand for a video: one a second, and where these are too many, the middles of
    `max_frames` equal runs of them."""
    step = max(1, round(frames_per_s))
    chosen = list(range(0, num_frames, step))
    if len(chosen) <= max_frames:
        return chosen
    gap = len(chosen) / max_frames
    return [chosen[int(i * gap + gap / 2)] for i in range(max_frames)]


def lay_out(
    turns: Sequence[Turn],
    images: Sequence[tuple[bytes, tuple[int, int]]],
    videos: Sequence[Sequence[bytes]],
    rules: ViewRules,
    marker: str,
) -> tuple[list[Turn], list[bytes | None]]:
    """Turns with one marker per view, and the picture of each view: None for one more view of the picture before.

    images: content, and width and height in pixels; videos: the frames of each. Both in order of their markers.
    Raises SampleFault (marker_count, bad_record, too_many_views).
    """
    text = "\n".join(text for _, text in turns)
    for what, found, of in ((marker, len(images), "pictures"), (VIDEO_MARKER, len(videos), "videos")):
        if text.count(what) != found:
            raise SampleFault("marker_count", f"{text.count(what)} of {what}, {found} {of}")
    if images and videos and rules.text == "v2":
        raise SampleFault("bad_record", "pictures and videos in one sample, which text v2 has no form for")
    is_cut = rules.cut != "none" and not videos and (rules.cut == "all" or len(images) == 1)
    left_images, left_videos = iter(images), iter(videos)
    views: list[bytes | None] = []

    def stand_in(part: str) -> str:
        if part == VIDEO_MARKER:
            frames = next(left_videos)
            views.extend(frames)
            return frames_text(len(frames), rules.text, marker)
        if part != marker:
            return part
        content, (width, height) = next(left_images)
        views.append(content)
        if not is_cut:
            return marker
        rows, columns = choose_anchor(width, height, rules.tile_size)
        views.extend([None] * (rows * columns))
        return tiles_text(rows, columns, rules.text, marker)

    split = re.compile(f"({re.escape(marker)}|{re.escape(VIDEO_MARKER)})").split
    laid_out = [(role, "".join(map(stand_in, split(text)))) for role, text in turns]
    if rules.max_views is not None and len(views) > rules.max_views:
        raise SampleFault("too_many_views", f"{len(views)} views, --max-views allows {rules.max_views}")
    return laid_out, views
