import gc
import io
import json
import os
import tarfile

import pytest

from megamm.data.sources import Fault, Record, Source, piece
from megamm.errors import DataError

ITEM = {"conversations": [{"from": "human", "value": "<image>\nHi"}, {"from": "gpt", "value": "Yes"}]}
TEXT = json.dumps(ITEM).encode()


def write(path, members):
    """Members: name and content, or a TarInfo."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def link(name, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    return info


def records(tmp_path, members):
    write(tmp_path / "set.tar", members)
    source = Source([tmp_path / "set.tar"])
    found = list(source)
    assert sum(piece.size for _, _, piece in source.pieces()) == (source.size if found else 0)
    return found


def test_samples(tmp_path):
    numbered = [(f"b/2.{i}.png", str(i).encode()) for i in (10, 9, 0)]
    first, second, third, fourth = records(
        tmp_path,
        [
            ("b/1.jpg", b"jpg"),
            ("b/1.JSON", TEXT),
            *numbered,
            ("b/2.json", TEXT),
            ("b/3.txt", b"Only text \n"),
            ("b/4.webp", b"webp"),
            ("b/4.json", b'{"width": 3}'),  # metadata of img2dataset
            ("b/4.txt", b"A cat"),
            ("b/4.cls", b"7"),
        ],
    )
    turns = [("human", "<image>\nHi"), ("gpt", "Yes")]
    assert first == Record(where="set.tar sample b/1", id="b/1", images=[b"jpg"], turns=turns)
    assert second.images == [b"0", b"9", b"10"]
    assert third.turns == [("human", ""), ("gpt", "Only text")]
    assert fourth.turns == [("human", "<image>"), ("gpt", "A cat")] and fourth.images == [b"webp"]


def test_pictures_in_the_tar_stand_for_the_paths_in_its_json(tmp_path):
    (found,) = records(
        tmp_path, [("1.jpg", b"jpg"), ("1.json", json.dumps(ITEM | {"id": 5, "image": "x.jpg"}).encode())]
    )
    assert found.images == [b"jpg"] and found.id == "5"


@pytest.mark.parametrize(
    ("members", "reason", "detail"),
    [
        ([("../2.jpg", b""), ("../2.json", TEXT)], "bad_record", "leads out of the tar"),
        ([("/2.jpg", b""), ("/2.json", TEXT)], "bad_record", "leads out of the tar"),
        ([("a/../../2.json", TEXT)], "bad_record", "leads out of the tar"),
        ([("2.json", TEXT), (link("2.jpg"), b"")], "bad_record", "'2.jpg' is a link"),
        ([("2.json", TEXT), (link("2.jpg", tarfile.LNKTYPE), b"")], "bad_record", "'2.jpg' is a link"),
        ([("2.json", TEXT), (link("2.jpg", tarfile.CHRTYPE), b"")], "bad_record", "'2.jpg' is a link or device"),
        ([("2.json", TEXT), ("2.jpg", b"a"), ("2.jpg", b"b")], "bad_record", "two members .jpg"),
        ([("2.jpg", b"a")], "bad_record", "no .txt and no .json with turns, only jpg"),
        ([("2.json", b"{")], "bad_record", "not JSON"),
        ([("2.txt", b"\xff")], "bad_record", "can't decode"),
        ([("2.json", b"x" * 20_000)], "record_too_long", ".json has 20000 bytes"),
    ],
)
def test_bad_samples_are_faults_and_do_not_stop_the_stream(members, reason, detail, tmp_path, monkeypatch):
    monkeypatch.setattr(piece, "RECORD_BYTES", 10_000)
    first, bad, last = records(tmp_path, [("1.json", TEXT), *members, ("3.json", TEXT)])
    assert isinstance(first, Record) and isinstance(last, Record)
    assert isinstance(bad, Fault) and bad.fault.reason == reason and detail in str(bad.fault)


def test_directories_are_no_samples(tmp_path):
    folder = tarfile.TarInfo("a")
    folder.type = tarfile.DIRTYPE
    (found,) = records(tmp_path, [(folder, b""), ("a/1.txt", b"x")])
    assert found.where == "set.tar sample a/1"


def damaged(path, change):
    data = bytearray(path.read_bytes())
    path.write_bytes(change(data))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:1200], "unexpected end of data|not readable as tar"),
        (lambda data: data[:3072] + b"x" * 512 + data[3584:], "damaged at byte 3072"),
        (lambda data: data[:3000], "damaged|unexpected end|not readable as tar"),
    ],
)
def test_a_damaged_tar_is_named_and_not_taken_for_a_short_one(change, message, tmp_path):
    write(tmp_path / "set.tar", [(f"{i}.txt", b"x" * 600) for i in range(4)])
    damaged(tmp_path / "set.tar", change)
    with pytest.raises(DataError, match=f"set.tar: .*({message}).*fetch it again"):
        list(Source([tmp_path / "set.tar"]))


def test_compressed_tars_are_refused(tmp_path):
    with tarfile.open(tmp_path / "set.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"))
    with pytest.raises(DataError, match="compressed with gzip; decompress it first"):
        Source([tmp_path / "set.tar"])


def test_nothing_is_held_of_members_that_were_passed(tmp_path):
    write(tmp_path / "set.tar", [(f"{i}.txt", b"x") for i in range(1000)])
    pieces = Source([tmp_path / "set.tar"]).pieces()
    for _ in range(3):
        next(pieces)
    assert sum(type(thing) is tarfile.TarInfo for thing in gc.get_objects()) < 10


def test_a_tar_without_its_end_blocks_is_whole(tmp_path):
    write(tmp_path / "set.tar", [("1.txt", b"x")])
    os.truncate(tmp_path / "set.tar", 1024)
    assert len(list(Source([tmp_path / "set.tar"]))) == 1
