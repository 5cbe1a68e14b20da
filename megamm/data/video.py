"""Videos -> frames as JPEG, when a dataset is written: training then reads pictures only. The one file that imports av
(PyAV), which brings ffmpeg's libraries along."""

import io
from collections.abc import Iterator

import av
import simplejpeg

from megamm.data.faults import SampleFault
from megamm.data.image import MAX_PIXELS
from megamm.data.views import choose_frames

FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,ogg,gif,asf"
"""Containers that ffmpeg may open. Playlists are not among them: they name other files and addresses, and it would
read these, too."""

JPEG_QUALITY = 95
"""Of stored frames, without chroma subsampling: a video has lost more already."""


def read_frames(content: bytes, max_frames: int) -> list[bytes]:
    """The frames of a video that `choose_frames` chooses, each as JPEG. Frames that cannot be decoded are not counted.

    Decodes the video once and holds one decoded frame. Raises SampleFault (video_broken) where none can be decoded.
    """
    try:
        with _open(content) as container:
            stream = container.streams.video[0]
            num_frames = sum(1 for packet in container.demux(stream) if packet.size)
            rate = float(stream.average_rate or 1)
        wanted = set(choose_frames(num_frames, rate, max_frames))
        frames = []
        with _open(content) as container:
            for i, frame in enumerate(_decoded(container)):
                if i in wanted:
                    rgb = frame.to_ndarray(format="rgb24")
                    frames.append(
                        simplejpeg.encode_jpeg(rgb, quality=JPEG_QUALITY, colorspace="RGB", colorsubsampling="444")
                    )
                if len(frames) == len(wanted):
                    break
    except (av.FFmpegError, IndexError, ValueError, MemoryError) as error:
        raise SampleFault("video_broken", f"{type(error).__name__}: {error}") from error
    if not frames:
        raise SampleFault("video_broken", "no frame can be decoded")
    return frames


def _open(content: bytes) -> "av.container.InputContainer":
    container = av.open(io.BytesIO(content), "r", options={"format_whitelist": FORMATS, "protocol_whitelist": "none"})
    if not container.streams.video:
        raise SampleFault("video_broken", "holds no video stream")
    size = container.streams.video[0].codec_context
    if size.width * size.height > MAX_PIXELS:
        raise SampleFault("video_broken", f"{size.width} x {size.height} pixels, more than {MAX_PIXELS}")
    return container


def _decoded(container: "av.container.InputContainer") -> Iterator["av.VideoFrame"]:
    for packet in container.demux(container.streams.video[0]):
        try:
            yield from packet.decode()
        except av.FFmpegError:  # one damaged packet; players show the rest, too
            continue
