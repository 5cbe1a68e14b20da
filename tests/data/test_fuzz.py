"""Whatever bytes come in: a result, a fault of the sample, or one MegammError. Never anything else."""

import io
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from megamm.data.faults import Fault, SampleFault
from megamm.data.image import MAX_PIXELS, decode, verify
from megamm.data.indexed import Reader, Writer
from megamm.data.sources import Record, Source
from megamm.errors import DataError

fuzz = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow's advice about what it reads


@st.composite
def damaged(draw, data):
    """Bytes with a few of them changed, then cut or lengthened."""
    content = bytearray(data)
    for _ in range(draw(st.integers(1, 8))):
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    return bytes(content[: draw(st.integers(0, len(content)))]) + draw(st.binary(max_size=8))


def picture(kind, **options):
    file = io.BytesIO()
    rgb = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    Image.fromarray(rgb).save(file, kind, **options)
    return file.getvalue()


PICTURES = st.sampled_from(
    [
        picture("JPEG"),
        picture("JPEG", progressive=True),
        picture("PNG"),
        picture("WEBP"),
        picture("GIF"),
        picture("TIFF"),
    ]
)


@fuzz
@given(data=PICTURES.flatmap(damaged) | st.binary(max_size=200))
def test_pictures(data):
    for function in (decode, verify):
        try:
            result = function(data)
        except SampleFault as fault:
            assert fault.reason == "image_broken"
        else:
            assert result is None or (
                result.dtype == np.uint8 and result.shape[2] == 3 and result.size <= 3 * MAX_PIXELS
            )


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["<image>", "a.jpg"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "conversations",
                    "messages",
                    "from",
                    "value",
                    "role",
                    "content",
                    "type",
                    "text",
                    "image",
                    "images",
                    "url",
                ]
                + ["image_url", "video", "id", "bytes", "path"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=10,
)
TURNS = st.lists(st.fixed_dictionaries({"from": VALUES, "value": VALUES}), max_size=3)
PARTS = st.lists(st.fixed_dictionaries({"type": st.sampled_from(["text", "image", "image_url", 3])}, optional={
    "text": VALUES, "image": VALUES, "image_url": VALUES, "path": VALUES
}), max_size=3)  # fmt: skip
MESSAGES = st.lists(st.fixed_dictionaries({"role": VALUES, "content": VALUES | PARTS}), max_size=3)
ITEMS = (
    VALUES
    | st.fixed_dictionaries({"conversations": TURNS}, optional={"image": VALUES, "images": VALUES, "id": VALUES})
    | st.fixed_dictionaries({"messages": MESSAGES}, optional={"image": VALUES, "videos": VALUES})
)


def read_all(path):
    for record in Source([path]):
        if isinstance(record, Record):
            for text in (*(text for turn in record.turns for text in turn), *record.images, *record.videos):
                assert isinstance(text, bytes) or text.encode() is not None
        else:
            assert isinstance(record, Fault) and str(record.fault)


@settings(fuzz, max_examples=100)
@given(items=st.lists(ITEMS, max_size=3))
def test_json_of_any_shape(items, tmp_path):
    path = tmp_path / "set.json"
    path.write_text(json.dumps(items))
    read_all(path)


GOOD = json.dumps([{"id": 1, "image": "a", "conversations": [{"from": "human", "value": '\\"}]\u00e9'}]}] * 2).encode()


@fuzz
@given(data=damaged(GOOD) | damaged(GOOD[1:-1].replace(b"}, {", b"}\n{")) | st.binary(max_size=60).map(b"[".__add__))
@example(data=b"[" + b"9" * 5000 + b"]")
@example(data=b"\xef\xbb\xbf[")
@example(data=b"[\\")
def test_json_of_any_bytes(data, tmp_path):
    path = tmp_path / "set.json"
    path.write_bytes(data)
    try:
        read_all(path)
    except DataError as error:
        assert str(path) in str(error)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    prefix = tmp_path_factory.mktemp("fuzz") / "set"
    with Writer(prefix) as writer:
        for i in range(3):
            ids, images = [1, *[-200] * i, 7, 2], [bytes([i]) * (5 + i)] * i
            writer.add(np.array(ids, np.int32), images, np.array([[1 + i, 3 + i]], np.int32))
        writer.finish({"family": "llava"})
    return prefix


INTEGERS = st.sampled_from([0, 1, -1, 2**31 - 1, -(2**31), 2**62, -(2**62)]) | st.integers(-(2**63), 2**63 - 1)


@fuzz
@given(data=st.data())
def test_an_index_of_any_bytes(data, whole, tmp_path):
    """The .idx keeps its length, which PREFIX.json says; every field of it may be anything."""
    for suffix in (".bin", ".json", ".idx"):
        content = bytearray(whole.with_suffix(suffix).read_bytes())
        if suffix == ".idx":
            for _ in range(data.draw(st.integers(1, 3))):
                size = data.draw(st.sampled_from([1, 4, 8]))
                at = data.draw(st.integers(0, len(content) - size))
                value = data.draw(INTEGERS) % 2 ** (8 * size)
                content[at : at + size] = struct.pack("<Q", value)[:size]
        (tmp_path / f"set{suffix}").write_bytes(content)
    try:
        reader = Reader(tmp_path / "set")
        for i in range(len(reader)):
            reader.text(i)
            for k in range(int(reader.num_images[i])):
                reader.image(i, k)
    except DataError as error:
        assert "preprocess again" in str(error)
