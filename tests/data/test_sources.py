import json
import os

import pytest

from megamm.data.faults import SampleFault
from megamm.data.sources import Fault, LlavaSource, Record, read_image
from megamm.errors import DataError

TEXT_ONLY = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]}
GOOD = {"id": "a", "image": "x.jpg"} | TEXT_ONLY


def records(path):
    source = LlavaSource(path)
    found = list(source)
    assert len(found) == len(source)
    return found


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("lines", [True, False])
def test_list_and_lines_give_the_same_records(lines, bom, tmp_path):
    path = tmp_path / "set.json"
    content = "\n\n".join(json.dumps(item) for item in (GOOD, TEXT_ONLY)) if lines else json.dumps([GOOD, TEXT_ONLY])
    path.write_bytes(bom + content.encode())
    first, second = records(path)
    turns = [("human", "Hi"), ("gpt", "Yes")]
    places = ("line 1", "line 3") if lines else ("item 1", "item 2")
    assert first == Record(where=f"set.json {places[0]}", id="a", images=["x.jpg"], turns=turns)
    assert second == Record(where=f"set.json {places[1]}", id="", images=[], turns=turns)


def test_several_pictures(tmp_path):
    path = tmp_path / "set.json"
    path.write_text(json.dumps([GOOD | {"image": ["x.jpg", "y.jpg"]}, GOOD | {"image": None}]))
    assert [record.images for record in records(path)] == [["x.jpg", "y.jpg"], []]


@pytest.mark.parametrize(
    "item",
    [
        7,
        {},
        {"conversations": "Hi"},
        {"conversations": ["Hi"]},
        {"conversations": [{"from": "human"}]},
        {"conversations": [{"from": "human", "value": 3}]},
        GOOD | {"image": 5},
        GOOD | {"image": ["x.jpg", None]},
        {"conversations": [{"from": "human", "value": "\ud800"}]},
    ],
)
def test_bad_records_are_faults_and_do_not_stop_the_stream(item, tmp_path):
    path = tmp_path / "set.json"
    path.write_text(json.dumps([GOOD, item, GOOD]))
    first, bad, last = records(path)
    assert isinstance(first, Record) and isinstance(last, Record)
    assert isinstance(bad, Fault) and bad.where == "set.json item 2" and bad.fault.reason == "bad_record"


@pytest.mark.parametrize("line", [b"{", b"nonsense", b"\xff\xfe\xfd", b"[" * 100_000])
def test_bad_line_is_a_fault(line, tmp_path):
    path = tmp_path / "set.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + line + b"\n" + json.dumps(GOOD).encode())
    first, bad, last = records(path)
    assert isinstance(first, Record) and isinstance(last, Record)
    assert isinstance(bad, Fault) and bad.where == "set.jsonl line 2" and bad.fault.reason == "bad_record"


@pytest.mark.parametrize("content", [b'[{"id": 1},', b"[\xff]"])
def test_broken_list_names_the_file(content, tmp_path):
    path = tmp_path / "set.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{path}: not LLaVA JSON"):
        LlavaSource(path)
    with pytest.raises(DataError, match="absent.json"):
        LlavaSource(tmp_path / "absent.json")


def reason(directory, name):
    with pytest.raises(SampleFault) as fault:
        read_image(directory, name)
    return fault.value.reason


def test_paths_stay_inside_the_directory(tmp_path):
    inside, secret = tmp_path / "images", tmp_path / "secret.jpg"
    (inside / "sub").mkdir(parents=True)
    (inside / "sub" / "a.jpg").write_bytes(b"a")
    (inside / "link.jpg").symlink_to(inside / "sub" / "a.jpg")
    secret.write_bytes(b"secret")
    (inside / "out.jpg").symlink_to(secret)
    (inside / "up").symlink_to(tmp_path)
    for name in ("sub/a.jpg", "link.jpg", "sub/../sub/a.jpg"):
        assert read_image(inside, name) == b"a"
    for name in ("../secret.jpg", str(secret), "out.jpg", "up/secret.jpg", "sub/../../secret.jpg"):
        assert reason(inside, name) == "image_outside"


def test_what_is_no_file_is_missing(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")  # reading it would wait for ever
    for name in ("absent.jpg", "pipe.jpg", ".", "a\0b.jpg", "x" * 5000):
        assert reason(tmp_path, name) == "image_missing"
