import base64
import json
import os
import tracemalloc

import pytest

from megamm.data.faults import SampleFault
from megamm.data.sources import Fault, Record, Source, piece, read_image
from megamm.errors import DataError

TEXT_ONLY = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]}
GOOD = {"id": "a", "image": "x.jpg"} | TEXT_ONLY
TURNS = [("human", "Hi"), ("gpt", "Yes")]


def records(path, form="auto"):
    source = Source([path], form)
    found = list(source)
    assert sum(piece.size for _, _, piece in source.pieces()) == (source.size if found else 0)
    return found


def one(tmp_path, item):
    path = tmp_path / "set.json"
    path.write_text(json.dumps([item]))
    (found,) = records(path)
    return found


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("lines", [True, False])
def test_list_and_lines_give_the_same_records(lines, bom, tmp_path):
    path = tmp_path / "set.json"
    content = "\n\n".join(json.dumps(item) for item in (GOOD, TEXT_ONLY)) if lines else json.dumps([GOOD, TEXT_ONLY])
    path.write_bytes(bom + content.encode())
    first, second = records(path)
    places = ("line 1", "line 3") if lines else ("item 1", "item 2")
    assert first == Record(where=f"set.json {places[0]}", id="a", images=["x.jpg"], turns=TURNS)
    assert second == Record(where=f"set.json {places[1]}", id="", images=[], turns=TURNS)


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("block", [1, 2, 7, 1 << 20])
def test_a_list_is_cut_at_its_items_wherever_the_blocks_end(block, indent, tmp_path, monkeypatch):
    monkeypatch.setattr("megamm.data.sources.json_file._BLOCK", block)
    texts = ['"', "\\", '\\"', "a\\\\", "][", "}{,", "\u00e9\u4e2d", '["', "\n"]
    items = [
        {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": text * 3}]} for text in texts
    ]
    path = tmp_path / "set.json"
    path.write_text(json.dumps(items, indent=indent, ensure_ascii=False), encoding="utf-8")
    assert [record.turns for record in records(path)] == [[("human", text), ("gpt", text * 3)] for text in texts]


@pytest.mark.parametrize(("content", "count"), [(b" [ ] ", 0), (b"[7]", 1), (b"[1, 2,3]\n", 3), (b'["a",[],{}]', 3)])
def test_lists_of_anything(content, count, tmp_path):
    (tmp_path / "set.json").write_bytes(content)
    assert len(records(tmp_path / "set.json")) == count


def test_several_files_and_directories(tmp_path):
    (tmp_path / "set").mkdir()
    for name in ("b.jsonl", "a.json", "notes.txt"):
        (tmp_path / "set" / name).write_text(json.dumps(GOOD))
    (tmp_path / "c.json").write_text(json.dumps([GOOD]))
    found = list(Source([tmp_path / "c.json", tmp_path / "set"]))
    assert [record.where for record in found] == ["c.json item 1", "a.json line 1", "b.jsonl line 1"]


def test_several_pictures(tmp_path):
    path = tmp_path / "set.json"
    path.write_text(json.dumps([GOOD | {"image": ["x.jpg", "y.jpg"]}, GOOD | {"image": None}, GOOD | {"image": ""}]))
    assert [record.images for record in records(path)] == [["x.jpg", "y.jpg"], [], []]


@pytest.mark.parametrize("keys", [("from", "value"), ("role", "content")])
@pytest.mark.parametrize("roles", [("human", "gpt"), ("user", "assistant"), ("USER", "chatgpt")])
def test_spellings_of_roles(roles, keys, tmp_path):
    turns = [dict(zip(keys, turn, strict=True)) for turn in zip(roles, ("Hi", "Yes"), strict=True)]
    assert one(tmp_path, {"conversations": turns}).turns == TURNS
    assert one(tmp_path, {"conversations": [dict(zip(keys, ("bot", "Hi"), strict=True))]}).turns == [("bot", "Hi")]


def test_system_text_goes_in_front_of_the_first_question(tmp_path):
    system = {"from": "system", "value": " Be brief. "}
    found = one(tmp_path, {"conversations": [system, *TEXT_ONLY["conversations"]]})
    assert found.turns == [("human", "Be brief.\n\nHi"), ("gpt", "Yes")]


PNG = base64.b64encode(b"picture").decode()
PARTS = {
    "a string": ("Hi", [], "Hi"),
    "text and picture": (
        [{"type": "text", "text": "See "}, {"type": "image_url", "image_url": {"url": "a/x.jpg"}}, " and say"],
        ["a/x.jpg"],
        "See <image> and say",
    ),
    "several pictures": (
        [{"type": "image", "image": "1.jpg"}, {"type": "text", "text": " or "}, {"type": "image", "path": "2.jpg"}],
        ["1.jpg", "2.jpg"],
        "<image> or <image>",
    ),
    "data url": ([{"type": "image_url", "image_url": f"data:image/png;base64,{PNG}"}], [b"picture"], "<image>"),
    "file url": ([{"type": "image_url", "image_url": {"url": "file:///a%20b.jpg"}}], ["/a b.jpg"], "<image>"),
}


@pytest.mark.parametrize("kind", PARTS)
def test_openai_messages(kind, tmp_path):
    content, images, question = PARTS[kind]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": "Yes"}]},
    ]
    found = one(tmp_path, {"messages": messages})
    assert found == Record(where="set.json item 1", id="", images=images, turns=[("human", question), ("gpt", "Yes")])


def test_pictures_beside_messages_belong_to_their_parts_in_order(tmp_path):
    content = [{"type": "image"}, {"type": "text", "text": " and "}, {"type": "image"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "Yes"}]
    found = one(tmp_path, {"messages": messages, "images": ["1.jpg", {"bytes": None, "path": "2.jpg"}]})
    assert found.images == ["1.jpg", "2.jpg"] and found.turns[0] == ("human", "<image> and <image>")


def test_videos_are_carried(tmp_path):
    messages = [
        {"role": "user", "content": [{"type": "video", "video": "a.mp4"}]},
        {"role": "assistant", "content": "?"},
    ]
    assert one(tmp_path, {"messages": messages}).videos == ["a.mp4"]
    assert one(tmp_path, TEXT_ONLY | {"video": "b.mp4"}).videos == ["b.mp4"]
    assert one(tmp_path, TEXT_ONLY | {"videos": ["b.mp4", "c.mp4"]}).videos == ["b.mp4", "c.mp4"]


def message(part):
    return {"messages": [{"role": "user", "content": [part]}, {"role": "assistant", "content": "Yes"}]}


BAD = {
    "number": (7, "bad_record"),
    "no turns": ({}, "bad_record"),
    "turns are text": ({"conversations": "Hi"}, "bad_record"),
    "turns are strings": ({"conversations": ["Hi"]}, "bad_record"),
    "no text": ({"conversations": [{"from": "human"}]}, "bad_record"),
    "text is a number": ({"conversations": [{"from": "human", "value": 3}]}, "bad_record"),
    "text is NaN": ({"conversations": [{"from": "human", "value": float("nan")}]}, "bad_record"),
    "picture is a number": (GOOD | {"image": 5}, "bad_record"),
    "picture is NaN": (GOOD | {"image": float("nan")}, "bad_record"),
    "picture is nothing": (GOOD | {"image": ["x.jpg", None]}, "bad_record"),
    "lone surrogate in text": ({"conversations": [{"from": "human", "value": "\ud800"}]}, "bad_record"),
    "lone surrogate in a role": ({"conversations": [{"from": "\ud800", "value": "a"}]}, "bad_record"),
    "lone surrogate in a path": (GOOD | {"image": "\udfff.jpg"}, "bad_record"),
    "both layouts": (GOOD | {"messages": []}, "bad_record"),
    "both image and images": (GOOD | {"images": ["y.jpg"]}, "bad_record"),
    "pictures in two places": (message({"type": "image", "image": "1.jpg"}) | {"image": "2.jpg"}, "bad_record"),
    "unknown part": (message({"type": "audio"}), "bad_record"),
    "part without a type": (message({}), "bad_record"),
    "picture behind a URL": (message({"type": "image_url", "image_url": {"url": "https://a/x.jpg"}}), "image_url"),
    "bucket": (GOOD | {"image": "s3://a/x.jpg"}, "image_url"),
    "damaged data URL": (message({"type": "image_url", "image_url": "data:image/png;base64,@@"}), "image_broken"),
    "data URL without data": (message({"type": "image_url", "image_url": "data:image/png"}), "image_broken"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_records_are_faults_and_do_not_stop_the_stream(kind, tmp_path):
    item, reason = BAD[kind]
    path = tmp_path / "set.json"
    path.write_text(json.dumps([GOOD, item, GOOD]))
    first, bad, last = records(path)
    assert isinstance(first, Record) and isinstance(last, Record)
    assert isinstance(bad, Fault) and bad.where == "set.json item 2" and bad.fault.reason == reason
    json.dumps(str(bad.fault)).encode()


BAD_LINES = [b"{", b"nonsense", b"\xff\xfe\xfd", b"[" * 100_000, b"1" * 5000, b'{"a": tru}']
BAD_ITEMS = [*BAD_LINES[1:3], *BAD_LINES[4:], b"[" * 50_000 + b"]" * 50_000]  # a list that is never closed is no list


@pytest.mark.parametrize(("line", "as_list"), [(x, False) for x in BAD_LINES] + [(x, True) for x in BAD_ITEMS])
def test_bad_json_is_a_fault(line, as_list, tmp_path):
    good = json.dumps(GOOD).encode()
    path = tmp_path / "set.jsonl"
    path.write_bytes(b"[" + b",".join([good, line, good]) + b"]" if as_list else b"\n".join([good, line, good]))
    first, bad, last = records(path)
    assert isinstance(first, Record) and isinstance(last, Record)
    place = "item" if as_list else "line"
    assert isinstance(bad, Fault) and bad.where == f"set.jsonl {place} 2" and bad.fault.reason == "bad_record"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"id": 1},', "never closed: the file is cut"),
        (b'[{"id": [}]', "never closed, in item 1"),
        (b'["a]', "never closed, in item 1"),
        (b"[1] [2]", "behind the end of the JSON list"),
        (b"[1]}]", "behind the end of the JSON list"),
        ("[1]".encode("utf-16"), "UTF-16, and JSON must be UTF-8"),
        (b"\x1f\x8b\x08\0", "compressed with gzip; decompress it first"),
    ],
)
def test_broken_files_are_named(content, message, tmp_path):
    path = tmp_path / "set.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{path}: .*{message}"):
        records(path)


def test_files_that_are_not_there_are_named(tmp_path):
    with pytest.raises(DataError, match="absent.json: no such file"):
        Source([tmp_path / "absent.json"])
    with pytest.raises(DataError, match=r"holds no file named \*.json"):
        Source([tmp_path])
    (tmp_path / "set.json").write_text("[]")
    with pytest.raises(DataError, match="--format: unknown 'llava'; choose one of auto, json"):
        Source([tmp_path / "set.json"], "llava")


@pytest.mark.parametrize("as_list", [True, False])
def test_a_record_too_long_is_a_fault_and_never_in_memory(as_list, tmp_path, monkeypatch):
    monkeypatch.setattr(piece, "RECORD_BYTES", 1000)
    good, path = json.dumps(GOOD).encode(), tmp_path / "set.json"
    with path.open("wb") as file:
        file.write((b"[" if as_list else b"") + good + (b"," if as_list else b"\n"))
        file.seek(60 * 2**20, os.SEEK_CUR)  # a hole, which takes no disk
        file.write((b"," if as_list else b"\n") + good + (b"]" if as_list else b""))
    tracemalloc.start()
    first, bad, last = records(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert isinstance(first, Record) and isinstance(last, Record) and peak < 10 * 2**20
    assert isinstance(bad, Fault) and bad.fault.reason == "record_too_long" and "2" in bad.where


def test_memory_does_not_grow_with_the_list(tmp_path):
    path = tmp_path / "set.json"
    item = json.dumps(GOOD | {"note": "x" * 2000})
    peaks = []
    for count in (1_000, 5_000):
        path.write_text("[" + ",".join([item] * count) + "]")
        source = Source([path])
        tracemalloc.start()
        assert sum(1 for _ in source) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] < 10 * 2**20


def test_pieces_do_not_depend_on_who_reads_them(tmp_path, monkeypatch):
    monkeypatch.setattr(piece, "PIECE_RECORDS", 3)
    monkeypatch.setattr(piece, "PIECE_BYTES", 1000)
    items = [GOOD | {"id": i, "note": "x" * (2000 if i == 4 else 10)} for i in range(8)]
    (tmp_path / "set.json").write_text(json.dumps(items))
    source = Source([tmp_path / "set.json"])
    assert [len(piece.records) for _, _, piece in source.pieces()] == [3, 1, 1, 3]
    assert [record.id for record in source] == [str(i) for i in range(8)]


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


def test_a_file_too_large_is_not_read(tmp_path):
    with (tmp_path / "huge.jpg").open("wb") as file:
        file.truncate(2**40)
    assert reason(tmp_path, "huge.jpg") == "image_broken"
