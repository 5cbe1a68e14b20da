"""The proof as a user runs it: a line per case, an exit status, and outputs that can be looked at."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tests" / "golden" / "llava" / "hf_native"
CASE = ("--case", FOLDER / "cases/one_image.npz")
NORMS = ("--grad-norms", FOLDER / "grad_norms.json")


@pytest.fixture
def run(monkeypatch):
    """The script in this process, for the import of torch takes seconds -> its exit status."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["verify.py", "--hf", str(FOLDER / "hf"), *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(ROOT / "tools" / "checkpoint" / "verify.py"), run_name="__main__")
        return stopped.value.code

    return call


def test_a_line_per_case_and_its_outputs(run, tmp_path, capsys):
    text_only = ("--case", FOLDER / "cases/text_only.npz")
    assert run(*CASE, *text_only, *NORMS, "--tp", 2, "--sequence-parallel", "--out", tmp_path) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["case"], line["ok"]) for line in lines] == [("one_image", True), ("text_only", True)]
    assert all(0 < line["logits"] < 1e-5 and line["gradient"] < 1e-4 for line in lines)
    written, recorded = np.load(tmp_path / "one_image.npz"), np.load(CASE[1])
    np.testing.assert_allclose(written["logits"], recorded["logits"], rtol=0, atol=1e-5)
    norms = json.loads(NORMS[1].read_text())["one_image"]
    assert {name.partition(":")[2] for name in written if name.startswith("grad_norm:")} >= norms.keys()
    key = "language_model.model.norm.weight"
    assert written[f"grad_norm:{key}"] == pytest.approx(norms[key], rel=1e-4)


def test_a_difference_above_the_limit_is_an_exit_status(run, capsys):
    assert run(*CASE, "--atol", 0) == 1
    assert not json.loads(capsys.readouterr().out)["ok"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*CASE, "--tp", 3), "tp=3 does not fit"),
        ((*CASE, "--grad-norms", "absent.json"), "--grad-norms absent.json: "),
        (("--case", "other.npz", *NORMS), "has no case other; it has one_image"),
    ],
)
def test_a_mistake_is_one_clear_message(arguments, message, run, capsys):
    assert run(*arguments) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and message in printed.err and not printed.out
