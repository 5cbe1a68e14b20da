import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from megamm.data.faults import REMEDIES

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("small_pieces")


@pytest.fixture
def check(load_script):
    return load_script("check")


@pytest.fixture
def options(inputs, tmp_path):
    return {name: inputs[name] for name in ("input", "image_dir", "family", "tokenizer")} | {
        "json": tmp_path / "r.json"
    }


def test_every_bad_sample_is_reported_in_one_pass(check, options, capsys):
    items = json.loads(options["input"][0].read_text())
    items[3]["conversations"][0]["value"] = "Why?"
    items[4]["image"] = "https://somewhere/a.jpg"
    items[5]["id"] = items[6]["id"] = "0"
    options["input"][0].write_text(json.dumps(items))
    assert not check.main(check.Options(**options))
    printed = capsys.readouterr().out.splitlines()
    report = json.loads(options["json"].read_text())
    expected = [(4, "marker_count"), (5, "image_url"), (8, "no_answer"), (21, "image_broken")]
    assert [(bad["where"], bad["reason"]) for bad in report["bad"]] == [
        (f"llava.json item {i}", reason) for i, reason in expected
    ]
    for line, bad in zip(printed, report["bad"], strict=False):
        assert line == f"{bad['where']}: {bad['reason']}: {bad['message']}; {bad['remedy']}"
        assert bad["remedy"] == REMEDIES[bad["reason"]]
    assert report["summary"] == {
        "num_samples": 42,
        "num_images": 38,
        "bad": {"marker_count": 1, "image_url": 1, "no_answer": 1, "image_broken": 1},
        "num_duplicate_ids": 2,
    }
    assert printed[-1].startswith("42 samples, 38 pictures; bad: ") and "2 ids are not the first" in printed[-1]


def test_number_of_processes_does_not_show(check, options, capsys):
    reports = []
    for workers in (1, 3):
        check.main(check.Options(**options, workers=workers))
        reports.append((capsys.readouterr().out, options["json"].read_text()))
    assert reports[0] == reports[1]


def test_a_good_source(check, options, capsys):
    options["input"][0].write_text(json.dumps(json.loads(options["input"][0].read_text())[:5]))
    assert check.main(check.Options(**options))
    assert capsys.readouterr().out == "5 samples, 5 pictures; bad: none\n"
    assert json.loads(options["json"].read_text())["bad"] == []


def test_a_damaged_file_hides_nothing_of_the_others(check, options, tmp_path, capsys):
    cut = tmp_path / "a.tar"
    with tarfile.open(cut, "w") as tar:
        for i in range(7):
            info = tarfile.TarInfo(f"{i}.txt" if i != 5 else "5.jpg")
            info.size = 700
            tar.addfile(info, io.BytesIO(b"x" * 700))
    os.truncate(cut, 6 * 1536 + 1000)
    options["input"] = (tmp_path / "a.tar", *options["input"])
    assert not check.main(check.Options(**options))
    reasons = [(bad["where"], bad["reason"]) for bad in json.loads(options["json"].read_text())["bad"]]
    assert reasons == [
        ("a.tar sample 5", "bad_record"),
        (str(cut), "bad_file"),
        ("llava.json item 8", "no_answer"),
        ("llava.json item 21", "image_broken"),
    ]
    assert "fetch it again" in capsys.readouterr().out


def test_exit_status(inputs):
    command = [sys.executable, ROOT / "data_tools" / "check.py", "--input", inputs["input"][0], "--family", "llava"]
    command += ["--image-dir", inputs["image_dir"], "--tokenizer", inputs["tokenizer"]]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 1 and len(done.stdout.splitlines()) == 3 and "Traceback" not in done.stderr
