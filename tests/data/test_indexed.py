import json
import os
import pickle
import struct

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megamm.batch import IMAGE
from megamm.data.indexed import Reader, Writer
from megamm.errors import DataError

DOCUMENTS = [
    ([1, IMAGE, 5, 6, 2], [b"12345"], [[3, 5]]),
    ([1, 5, 6], [], [[1, 2], [2, 3]]),
    ([IMAGE, 9, IMAGE, 2], [b"", b"1234"], [[3, 4]]),
    ([1], [], []),
]


def write(prefix, documents=DOCUMENTS, origin=None):
    with Writer(prefix) as writer:
        for ids, images, spans in documents:
            writer.add(np.array(ids, np.int32), images, np.array(spans, np.int32).reshape(-1, 2))
        return writer.finish(origin or {"family": "llava"})


def files(directory):
    return sorted(path.name for path in directory.iterdir())


def test_round_trip(tmp_path):
    info = write(tmp_path / "set")
    assert files(tmp_path) == ["set.bin", "set.idx", "set.json"]
    reader = Reader(tmp_path / "set")
    assert len(reader) == len(DOCUMENTS) and reader.info == info
    for i, (ids, images, spans) in enumerate(DOCUMENTS):
        found_ids, found_spans = reader.text(i)
        assert found_ids.tolist() == ids and found_spans.tolist() == spans
        assert [reader.image(i, k) for k in range(len(images))] == images
    assert reader.num_ids.tolist() == [5, 3, 4, 1] and reader.num_images.tolist() == [1, 0, 2, 0]
    with pytest.raises(IndexError, match="4 documents"):
        reader.text(-1)
    with pytest.raises(IndexError, match="1 images, not one numbered 1"):
        reader.image(0, 1)


def test_json_says_what_is_inside(tmp_path):
    info = write(tmp_path / "set", origin={"family": "llava", "skipped": {"no_answer": 3}})
    assert info == json.loads((tmp_path / "set.json").read_text())
    counts = {"documents": 4, "tokens": 13, "images": 3, "targets": 5, "skipped": {"no_answer": 3}}
    assert counts.items() <= info.items() and info["format_version"] == 1
    assert info["tokens_per_document"] == {"mean": 3.25, "p50": 3, "p90": 5, "p99": 5, "max": 5}
    assert info["images_per_document"] == {"mean": 0.75, "p50": 0, "p90": 2, "p99": 2, "max": 2}


def test_stock_megatron_reads_it(tmp_path):
    write(tmp_path / "set")
    stock = IndexedDataset(str(tmp_path / "set"), multimodal=True)
    assert stock.document_indices.tolist() == [0, 3, 5, 9, 11]
    found = [(array.tolist(), int(mode), array.dtype) for array, mode in (stock[i] for i in range(len(stock)))]
    word = lambda data: list(struct.unpack(f"<{len(data) // 4}i", data))  # noqa: E731
    assert found == [
        (sequence, mode, np.int32)
        for sequence, mode in (
            ([1, IMAGE, 5, 6, 2], 0),
            ([3, *word(b"12345\0\0\0")], 1),
            ([3, 5], 2),
            ([1, 5, 6], 0),
            ([1, 2, 2, 3], 2),
            ([IMAGE, 9, IMAGE, 2], 0),
            ([0], 1),
            ([0, *word(b"1234")], 1),
            ([3, 4], 2),
            ([1], 0),
            ([], 2),
        )
    ]


def test_reader_is_pickled_by_its_name(tmp_path):
    write(tmp_path / "set", [([1] * 100_000, [], [])])
    content = pickle.dumps(Reader(tmp_path / "set"))
    assert len(content) < 1000 and len(pickle.loads(content).text(0)[0]) == 100_000  # noqa: S301 our own bytes


def test_no_document_is_a_dataset(tmp_path):
    write(tmp_path / "set", [])
    assert len(Reader(tmp_path / "set")) == 0


def test_damage_far_inside_is_refused_too(tmp_path):
    """An index is checked in blocks."""
    num = 40_000
    write(tmp_path / "set", [([1, 5], [], [[1, 2]])] * num)
    assert len(Reader(tmp_path / "set")) == num
    whole = (tmp_path / "set.idx").read_bytes()
    offsets, starts, modes = HEADER + 8 * num, HEADER + 24 * num, HEADER + 24 * num + 8 * (num + 1)
    for at, value in (
        (HEADER + 4 * 39_999, b"\x03"),
        (offsets + 8 * 2**15, b"\x04"),
        (offsets + 8 * (2 * num - 1), b"\x04"),
        (starts + 8 * 2**15, b"\x01"),
        (starts + 8 * (num - 1), b"\x01"),
        (modes + 2 * num - 1, b"\x01"),
        (modes + 2**16, b"\x02"),
    ):
        damage(at, value)(tmp_path / "set")
        with pytest.raises(DataError, match="set.idx: "):
            Reader(tmp_path / "set")
        (tmp_path / "set.idx").write_bytes(whole)


def test_abandoned_writing_leaves_the_old_dataset(tmp_path):
    write(tmp_path / "set")
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    with pytest.raises(KeyboardInterrupt), Writer(tmp_path / "set") as writer:
        writer.add(np.array([1], np.int32), [], np.empty((0, 2), np.int32))
        raise KeyboardInterrupt
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_death_between_the_renames_leaves_nothing_that_opens(renames, tmp_path, monkeypatch):
    write(tmp_path / "set")
    real, done = os.replace, []

    def replace(source, target):
        if len(done) == renames:
            raise OSError("power cut")
        done.append(real(source, target))

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(DataError, match="power cut"):
        write(tmp_path / "set", DOCUMENTS[:1])
    with pytest.raises(DataError, match="set.json: not found; without it a dataset is not whole.*give the prefix"):
        Reader(tmp_path / "set")


def test_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written .*choose another place"):
        Writer(tmp_path / "file" / "set")


def test_full_disk_is_one_clear_message(tmp_path):
    (tmp_path / "set.bin.tmp").symlink_to("/dev/full")
    with pytest.raises(DataError, match="set.bin.tmp: cannot be written .*No space left.*make room"):
        write(tmp_path / "set", [([1] * 100_000, [], [])] * 3)
    assert not (tmp_path / "set.json").exists()


HEADER = 9 + 8 + 1 + 8 + 8
SEQUENCES = 11


def damage(at, value):
    def change(prefix):
        data = bytearray((prefix.with_suffix(".idx")).read_bytes())
        data[at : at + len(value)] = value
        prefix.with_suffix(".idx").write_bytes(data)

    return change


def edit_json(**changes):
    def change(prefix):
        info = json.loads(prefix.with_suffix(".json").read_text())
        prefix.with_suffix(".json").write_text(json.dumps(info | changes))

    return change


def cut(suffix):
    return lambda prefix: os.truncate(prefix.with_suffix(suffix), prefix.with_suffix(suffix).stat().st_size - 4)


def swap_lengths(prefix):
    """Two text lengths exchanged: every sum still fits, the offsets in between do not."""
    damage(HEADER, struct.pack("<i", 6))(prefix)
    damage(HEADER + 4, struct.pack("<i", 2))(prefix)


OFFSETS = HEADER + 4 * SEQUENCES
STARTS = OFFSETS + 8 * SEQUENCES
MODES = STARTS + 8 * 5
DAMAGES = {
    "no_json": lambda prefix: prefix.with_suffix(".json").unlink(),
    "no_bin": lambda prefix: prefix.with_suffix(".bin").unlink(),
    "no_idx": lambda prefix: prefix.with_suffix(".idx").unlink(),
    "bin_cut": cut(".bin"),
    "idx_cut": cut(".idx"),
    "json_broken": lambda prefix: prefix.with_suffix(".json").write_text("{"),
    "json_list": lambda prefix: prefix.with_suffix(".json").write_text("[]"),
    "json_version": edit_json(format_version=2),
    "json_bytes": edit_json(bin_bytes="many"),
    "json_documents": edit_json(documents=3),
    "magic": damage(0, b"X"),
    "version": damage(9, b"\x02"),
    "dtype": damage(17, b"\x05"),
    "too_many_sequences": damage(18, struct.pack("<Q", 2**60)),
    "no_documents": damage(26, struct.pack("<Q", 0)),
    "negative_length": damage(HEADER, struct.pack("<i", -5)),
    "huge_length": damage(HEADER, struct.pack("<i", 2**31 - 1)),
    "swapped_lengths": swap_lengths,
    "first_offset": damage(OFFSETS, struct.pack("<q", 4)),
    "negative_offset": damage(OFFSETS + 8, struct.pack("<q", -8)),
    "offset_past_the_end": damage(OFFSETS + 8 * 10, struct.pack("<q", 2**40)),
    "document_start": damage(STARTS + 8, struct.pack("<q", 2**40)),
    "document_order": damage(STARTS + 8, struct.pack("<q", 7)),
    "documents_beyond_int64": damage(STARTS + 8, struct.pack("<3q", 2**62, 2**63 - 1, -(2**62))),  # differences wrap
    "mode_of_a_text": damage(MODES + 3, b"\x01"),
    "mode_of_spans": damage(MODES + 2, b"\x01"),
    "mode": damage(MODES + 1, b"\x00"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_refused_when_opened(kind, tmp_path):
    write(tmp_path / "set")
    DAMAGES[kind](tmp_path / "set")
    with pytest.raises(DataError, match="set\\.(bin|idx|json): "):
        Reader(tmp_path / "set")


@pytest.mark.parametrize(
    ("word", "value", "read", "message"),
    [
        (1, 5, lambda reader: reader.text(0), "other pictures than its ids say"),
        (5, 4, lambda reader: reader.image(0, 0), "image 0 is damaged"),
        (5, -1, lambda reader: reader.image(0, 0), "image 0 is damaged"),
        (9, 6, lambda reader: reader.text(0), "target spans outside"),
        (8, -1, lambda reader: reader.text(0), "target spans outside"),
    ],
)
def test_damage_inside_is_refused_when_read(word, value, read, message, tmp_path):
    write(tmp_path / "set")
    with (tmp_path / "set.bin").open("r+b") as file:
        file.seek(4 * word)
        file.write(struct.pack("<i", value))
    with pytest.raises(DataError, match=message):
        read(Reader(tmp_path / "set"))
