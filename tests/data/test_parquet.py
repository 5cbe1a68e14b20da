import os
import subprocess
import sys

import pyarrow
import pytest
from pyarrow import parquet

from megamm.data.sources import Fault, Record, Source
from megamm.errors import DataError

TURNS = [("human", "<image>\nHi"), ("gpt", "Yes")]
CONVERSATION = [{"from": role, "value": text} for role, text in TURNS]
MESSAGES = [{"role": "user", "content": "<image>\nHi"}, {"role": "assistant", "content": "Yes"}]


def write(path, columns, **options):
    parquet.write_table(pyarrow.table(columns), path, **options)
    return path


LAYOUTS = {
    "struct of bytes": ({"conversations": [CONVERSATION], "image": [{"bytes": b"jpg", "path": "x.jpg"}]}, [b"jpg"]),
    "struct of a path": ({"conversations": [CONVERSATION], "image": [{"bytes": None, "path": "x.jpg"}]}, ["x.jpg"]),
    "bytes": ({"conversations": [CONVERSATION], "image": [b"jpg"]}, [b"jpg"]),
    "path": ({"messages": [MESSAGES], "image": ["x.jpg"]}, ["x.jpg"]),
    "several": (
        {"messages": [MESSAGES], "images": [[{"bytes": b"1", "path": None}, {"bytes": b"2", "path": None}]]},
        [b"1", b"2"],
    ),
    "none": ({"messages": [MESSAGES], "images": pyarrow.array([None], pyarrow.list_(pyarrow.binary()))}, []),
    "lists per key": (
        {"conversations": [{"from": ["human", "gpt"], "value": ["<image>\nHi", "Yes"]}], "image": ["x.jpg"]},
        ["x.jpg"],
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, tmp_path):
    columns, images = LAYOUTS[layout]
    write(tmp_path / "set.parquet", {**columns, "id": [5], "unread": ["x"]})
    assert list(Source([tmp_path / "set.parquet"])) == [
        Record(where="set.parquet row 1", id="5", images=images, turns=TURNS)
    ]


def test_rows_are_read_group_by_group(tmp_path):
    columns = {"id": list(range(100)), "conversations": [CONVERSATION] * 100}
    source = Source([write(tmp_path / "set.parquet", columns, row_group_size=30)])
    pieces = list(source.pieces())
    assert len(pieces) == 4 and sum(piece.size for _, _, piece in pieces) == source.size
    assert [(record.where, record.id) for record in source] == [
        (f"set.parquet row {i + 1}", str(i)) for i in range(100)
    ]


def test_bad_rows_are_faults(tmp_path):
    conversations = [CONVERSATION, None, CONVERSATION]
    broken = pyarrow.StringArray.from_buffers(
        3, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pyarrow.py_buffer(b"a\xffc")
    )
    write(tmp_path / "set.parquet", {"conversations": conversations})
    first, bad, last = Source([tmp_path / "set.parquet"])
    assert isinstance(first, Record) and isinstance(last, Record)
    assert isinstance(bad, Fault) and bad.where == "set.parquet row 2" and bad.fault.reason == "bad_record"
    write(tmp_path / "text.parquet", {"conversations": [CONVERSATION] * 3, "id": broken})
    first, bad, last = Source([tmp_path / "text.parquet"])
    assert isinstance(bad, Fault) and bad.where == "text.parquet row 2" and "utf-8" in str(bad.fault)


def cut(path):
    os.truncate(path, path.stat().st_size - 20)


def overwrite(path):
    with path.open("r+b") as file:
        file.seek(4)
        file.write(b"\xff" * 60)


@pytest.mark.parametrize("damage", [cut, overwrite])
def test_damaged_files_are_named(damage, tmp_path):
    damage(write(tmp_path / "set.parquet", {"conversations": [CONVERSATION] * 3}))
    with pytest.raises(DataError, match="set.parquet: not readable as Parquet .*fetch it again"):
        list(Source([tmp_path / "set.parquet"]))


def test_other_columns_are_named(tmp_path):
    write(tmp_path / "set.parquet", {"question": ["Hi"], "answer": ["Yes"]})
    with pytest.raises(DataError, match="no column `conversations` or `messages`, but question, answer"):
        list(Source([tmp_path / "set.parquet"]))


def test_pictures_of_a_row_group_are_not_in_memory_together(tmp_path):
    """80 MB of pictures in one row group, in a process of its own."""
    picture = os.urandom(400_000)
    columns = {"conversations": [CONVERSATION] * 200, "image": [picture[i:] + picture[:i] for i in range(200)]}
    write(tmp_path / "set.parquet", columns, compression="none", use_dictionary=False, data_page_size=2**20)
    code = """
import resource, sys
from pathlib import Path
from megamm.data.sources import Source, parquet_file
import pyarrow.parquet
source = Source([Path(sys.argv[1])])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert sum(len(record.images[0]) for record in source) == 200 * 400_000
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    command = [sys.executable, "-c", code, tmp_path / "set.parquet"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 50_000  # kB


def test_missing_pyarrow_is_one_clear_message(tmp_path, monkeypatch):
    write(tmp_path / "set.parquet", {"conversations": [CONVERSATION]})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"reading Parquet needs pyarrow \(pip install 'megamm\[data\]'\)"):
        list(Source([tmp_path / "set.parquet"]))
