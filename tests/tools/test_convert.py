"""The checkpoint scripts as a user runs them."""

import json
import runpy
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megamm.weights.convert import import_hf
from megamm.weights.hf import read_config
from tests.weights import tiny

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "llava" / "hf_native" / "hf"


def run(script, *arguments):
    return subprocess.run(
        [sys.executable, ROOT / "tools" / "checkpoint" / script, *map(str, arguments)],
        capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "step_00000003"
    done = run("hf_to_megatron.py", "--hf", GOLDEN, "--output", path)
    assert done.returncode == 0, done.stderr
    assert "family llava, dialect hf" in done.stdout
    return path


def test_import_and_export_give_back_every_bit(checkpoint, tmp_path):
    done = run("megatron_to_hf.py", "--checkpoint", checkpoint, "--output", tmp_path / "back")
    assert done.returncode == 0, done.stderr
    expected, found = load_file(GOLDEN / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
               for name, tensor in expected.items())  # fmt: skip
    assert read_config(tmp_path / "back") == read_config(GOLDEN)


def test_export_in_another_dialect_from_a_run_directory(checkpoint, tmp_path):
    arguments = ("--checkpoint", checkpoint.parent, "--output", tmp_path / "back", "--dialect", "original")
    done = run("megatron_to_hf.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert "model.mm_projector.0.weight" in load_file(tmp_path / "back" / "model.safetensors")
    assert read_config(tmp_path / "back")["mm_projector_type"] == "mlp2x_gelu"


def test_a_start_says_what_was_copied_and_drawn(tmp_path):
    llm, tower = write_parts(tmp_path)
    output = ("--output", tmp_path / "start")
    arguments = ("--llm", llm, "--tower", tower, "--family", "llava", "--seed", "3", *output)
    done = run("hf_to_megatron.py", *arguments)
    assert done.returncode == 0, done.stderr
    rows = [line.replace("│", " ").split()[:4] for line in done.stdout.splitlines()]
    used = {name: tensor for name, tensor in load_file(tower / "model.safetensors").items()
            if "layers.3." not in name and "post_layernorm" not in name}  # fmt: skip
    assert ["vision", "41", f"{sum(tensor.numel() for tensor in used.values()):,}", "copied"] in rows, done.stdout
    assert ["projector", "4", "6,272", "drawn"] in rows and rows[-1][0] == f"{tmp_path / 'start'}:"
    assert run("show.py", tmp_path / "start").returncode == 0


def test_a_tower_of_its_own_repository_is_taken_in(tmp_path, monkeypatch):
    whole = load_file(GOLDEN / "model.safetensors")
    for name in ("hf", "tower"):
        (tmp_path / name).mkdir()
    (tmp_path / "hf" / "config.json").write_text((GOLDEN / "config.json").read_text())
    tower = {name.removeprefix("vision_tower."): tensor for name, tensor in whole.items() if "vision_tower" in name}
    save_file(tower, tmp_path / "tower" / "model.safetensors")
    rest = {name: tensor for name, tensor in whole.items() if "vision_tower" not in name}
    save_file(rest, tmp_path / "hf" / "model.safetensors")
    arguments = ("--hf", tmp_path / "hf", "--family", "llava", "--output", tmp_path / "checkpoint")
    assert "--tower" in refused(monkeypatch, tmp_path, "hf_to_megatron.py", *arguments)
    done = run("hf_to_megatron.py", *arguments, "--tower", tmp_path / "tower")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("run_directory", [False, True])
def test_show_lists_tensors_and_parameters_by_part(checkpoint, run_directory):
    done = run("show.py", checkpoint.parent if run_directory else checkpoint)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.strip("│ \n").split("│")] for line in done.stdout.splitlines()]
    assert ["llm.decoder.layers.0.mlp.linear_fc1.weight", "192 x 64", "float32"] in rows
    parts = {row[0]: row[1:3] for row in rows if len(row) == 4}
    whole = load_file(GOLDEN / "model.safetensors")
    llm = sum(tensor.numel() for name, tensor in whole.items() if name.startswith("language_model."))
    assert parts["llm"] == ["21", f"{llm:,}"]
    kept = int(parts["kept, never computed with"][1].replace(",", ""))
    total = int(parts["model"][1].replace(",", ""))
    assert kept + total == sum(tensor.numel() for tensor in whole.values())


def write_parts(directory):
    """A plain llm and a plain tower, cut out of the golden model: two directories."""
    whole, config = load_file(GOLDEN / "model.safetensors"), read_config(GOLDEN)
    written = []
    for part, prefix, its in (("llm", "language_model.", "text_config"), ("tower", "vision_tower.", "vision_config")):
        (directory / part).mkdir()
        tensors = {name.removeprefix(prefix): tensor for name, tensor in whole.items() if name.startswith(prefix)}
        save_file(tensors, directory / part / "model.safetensors")
        (directory / part / "config.json").write_text(json.dumps(config[its]))
        written.append(directory / part)
    return written


def test_a_mistake_is_one_clear_message_and_a_status(tmp_path):
    done = run("hf_to_megatron.py", "--hf", GOLDEN, "--family", "lava", "--output", tmp_path / "output")
    assert done.returncode == 1 and "llava" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "output").exists()


def test_a_checkpoint_that_cannot_be_exported_is_refused(tmp_path, monkeypatch):
    import_hf(tiny.write_release(tmp_path / "tiny", tiny.tensors()), None, [tiny.FAMILY], tmp_path / "other")
    output = ("--output", tmp_path / "output")
    for script, arguments, message in [
        ("megatron_to_hf.py", ("--checkpoint", tmp_path / "other", *output), "model.family 'tiny' is unknown"),
        ("show.py", (tmp_path,), "neither a megamm checkpoint"),
    ]:
        assert message in refused(monkeypatch, tmp_path, script, *arguments)


def refused(monkeypatch, directory, script, *arguments):
    """The message of a script that must refuse; run in this process, for the import of torch takes seconds."""
    before = sorted(directory.rglob("*"))
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "tools" / "checkpoint" / script), run_name="__main__")
    assert isinstance(stopped.value.code, str), "the exit status is not 1"
    assert sorted(directory.rglob("*")) == before, "something was written"
    return stopped.value.code


def lying(header, data=b"\0" * 16):
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


def entry(begin, end, shape):
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


NORM = "language_model.model.norm.weight"
WHOLE = "model.safetensors is no whole safetensors file"
FILES = {
    "truncated": lambda whole: whole[:-10],
    "empty": lambda whole: b"",
    "a-huge-header": lambda whole: struct.pack("<Q", 10**15) + whole[8:],
    "past-the-end": lambda whole: lying({"a": entry(0, 32, [8])}),
    "overlap": lambda whole: lying({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}),
    "another-shape": lambda whole: lying({"a": entry(0, 16, [3])}),
}


@pytest.mark.parametrize("lie", FILES)
def test_a_broken_or_lying_file_is_refused_by_the_script(tmp_path, monkeypatch, lie):
    (tmp_path / "config.json").write_text((GOLDEN / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(FILES[lie]((GOLDEN / "model.safetensors").read_bytes()))
    message = refused(monkeypatch, tmp_path, "hf_to_megatron.py", "--hf", tmp_path, "--output", tmp_path / "output")
    assert WHOLE in message and message.startswith("error: ")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tensors: tensors.pop(NORM), f"missing: {NORM}\n"),
        (lambda tensors: tensors.update(stranger=torch.zeros(1)), "not in its table: stranger\n"),
        (lambda tensors: tensors.update({NORM: torch.zeros(63)}), f"{NORM} is (63,), not (64,)"),
        (
            lambda tensors: tensors.update({"multi_modal_projector.linear_1.bias": torch.zeros(64, 1)}),
            "multi_modal_projector.linear_1.bias is (64, 1), not (64,)",
        ),
        (
            lambda tensors: tensors.update({"language_model.lm_head.weight": torch.zeros(127, 64)}),
            "language_model.lm_head.weight is (127, 64), not (128, 64)",
        ),
        (
            lambda tensors: tensors.update({"lm_head.weight": torch.zeros(128, 64)}),
            "not in its table: lm_head.weight\n",
        ),
        (lambda tensors: tensors.clear() or tensors.update(x=torch.zeros(1)), "fit no dialect of the family"),
    ],
    ids=["missing", "extra", "shape", "shape-of-the-projector", "shape-of-the-vocabulary", "twice", "stranger"],
)
def test_tensors_that_do_not_fit_are_named_by_the_script(tmp_path, monkeypatch, change, message):
    tensors = load_file(GOLDEN / "model.safetensors")
    change(tensors)
    (tmp_path / "config.json").write_text((GOLDEN / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors")
    found = refused(monkeypatch, tmp_path, "hf_to_megatron.py", "--hf", tmp_path, "--output", tmp_path / "output")
    assert message in found


def test_one_name_in_two_files_is_refused_by_the_script(tmp_path, monkeypatch):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / name, tmp_path)
    torch.save({NORM: torch.zeros(64)}, tmp_path / "pytorch_model.bin")
    found = refused(monkeypatch, tmp_path, "hf_to_megatron.py", "--hf", tmp_path, "--output", tmp_path / "output")
    assert f"{NORM} is both in" in found and "model.safetensors" in found and "pytorch_model.bin" in found


def test_a_tower_that_contradicts_the_config_is_refused_by_the_script(tmp_path, monkeypatch):
    llm, tower = write_parts(tmp_path)
    config = json.loads((tower / "config.json").read_text())
    start = ("--llm", llm, "--tower", tower, "--family", "llava")
    for change, import_says, start_says in [
        (dict(num_attention_heads=2), "num_heads 4, the --tower's config.json 2", None),
        (dict(hidden_size=64), "hidden_size 32, the --tower's config.json 64", "is (32,), not (64,)"),
        (dict(patch_size=7), "patch_size 14, the --tower's config.json 7", "is (32, 3, 14, 14), not (32, 3, 7, 7)"),
    ]:
        (tower / "config.json").write_text(json.dumps({**config, **change}))
        output = ("--output", tmp_path / "output")
        found = refused(monkeypatch, tmp_path, "hf_to_megatron.py", "--hf", GOLDEN, "--tower", tower, *output)
        assert import_says in found
        if start_says:
            assert start_says in refused(monkeypatch, tmp_path, "hf_to_megatron.py", *start, *output)


def test_a_start_needs_all_its_parts(tmp_path, monkeypatch):
    llm, tower = write_parts(tmp_path)
    output = ("--output", tmp_path / "output")
    script = "hf_to_megatron.py"
    assert "give --hf" in refused(monkeypatch, tmp_path, script, *output)
    assert "--llm needs --tower and --family" in refused(monkeypatch, tmp_path, script, "--llm", llm, *output)
    swapped = ("--llm", tower, "--tower", llm, "--family", "llava")
    assert "the llm's config.json: model_type 'clip_vision_model'" in refused(
        monkeypatch, tmp_path, script, *swapped, *output
    )
