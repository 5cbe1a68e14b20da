"""Videos -> frames, made and read with PyAV."""

import io
from fractions import Fraction

import av
import numpy as np
import pytest

from megamm.data.faults import SampleFault
from megamm.data.image import decode
from megamm.data.prepare import Document, Preparer, Recipe
from megamm.data.sources import Fault, Record, Source
from megamm.data.video import read_frames
from megamm.data.views import ViewRules

ADDED = {"<|im_start|>": 457, "<|im_end|>": 458}


def clip(num_frames=20, rate=4, size=(64, 48)):
    """An MPEG-4 video whose frame i is grey of value 10 * i."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(rate))
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.bit_rate = 10**6
        for i in range(num_frames):
            grey = np.full((size[1], size[0], 3), 10 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def numbers(frames):
    """Which frames of `clip` these are."""
    return [round(decode(frame).mean() / 10) for frame in frames]


def test_frames_are_one_a_second_or_the_middles_of_equal_runs():
    content = clip()
    assert numbers(read_frames(content, 16)) == [0, 4, 8, 12, 16]
    assert numbers(read_frames(content, 2)) == [4, 12]
    assert decode(read_frames(content, 1)[0]).shape == (48, 64, 3)


def test_a_damaged_end_leaves_the_frames_before_it():
    content = clip()
    start = content.index(b"mdat") + 4
    length = int.from_bytes(content[start - 8 : start - 4], "big")
    damaged = content[: start + length // 2] + bytes(length - length // 2 - 8) + content[start + length - 8 :]
    found = numbers(read_frames(damaged, 16))
    assert found[:2] == [0, 4]


@pytest.mark.parametrize(
    "content",
    [b"", b"<html>no video</html>", b"#EXTM3U\n#EXTINF:1,\nhttp://localhost/a.ts\n", clip()[:600]],
    ids=["empty", "page", "playlist", "truncated"],
)
def test_a_video_without_a_decodable_frame_is_a_fault(content):
    with pytest.raises(SampleFault) as fault:
        read_frames(content, 4)
    assert fault.value.reason == "video_broken"


def test_a_playlist_names_files_in_vain(tmp_path):
    (tmp_path / "a.ts").write_bytes(clip())
    playlist = f"ffconcat version 1.0\nfile '{tmp_path / 'a.ts'}'\n".encode()
    with pytest.raises(SampleFault):
        read_frames(playlist, 4)


def test_a_sound_without_pictures_is_a_fault():
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with pytest.raises(SampleFault, match="no video stream"):
        read_frames(file.getvalue(), 4)


def test_a_record_with_a_video_becomes_a_document_of_frames(make_tokenizer, tmp_path):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.mp4").write_bytes(clip())
    (tmp_path / "clips" / "bad.mp4").write_bytes(b"no video")
    (tmp_path / "set.jsonl").write_text(
        '{"id": 1, "video": "a.mp4", "conversations": [{"from": "human", "value": "<video>\\nWhat?"}, '
        '{"from": "gpt", "value": "grey"}]}\n'
    )
    [record] = Source([tmp_path / "set.jsonl"])
    assert isinstance(record, Record) and record.videos == ["a.mp4"] and record.images == []
    prepare = Preparer(
        Recipe(
            image_dir=tmp_path / "clips",
            tokenizer_dir=make_tokenizer("byte_bpe", added_tokens=ADDED),
            template="mplug_owl3",
            marker="<image>",
            views=ViewRules(text="v3", max_frames=3),
        )
    )
    document = prepare(record)
    assert isinstance(document, Document) and numbers(document.images) == [0, 8, 16]
    assert np.count_nonzero(document.ids == -200) == 3
    bad = prepare(Record(where="x", id="", images=[], turns=record.turns, videos=["bad.mp4"]))
    assert isinstance(bad, Fault) and bad.fault.reason == "video_broken" and "bad.mp4" in str(bad.fault)
    outside = prepare(Record(where="x", id="", images=[], turns=record.turns, videos=["../set.jsonl"]))
    assert isinstance(outside, Fault) and outside.fault.reason == "image_outside"
