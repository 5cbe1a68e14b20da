"""The checkpoint scripts as a user runs them."""

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
    arguments = ("--checkpoint", checkpoint.parent, "--output", tmp_path / "back", "--dialect", "hf-5")
    done = run("megatron_to_hf.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert "vision_tower.embeddings.class_embedding" in load_file(tmp_path / "back" / "model.safetensors")


def test_a_tower_of_its_own_repository_is_taken_in(tmp_path):
    whole = load_file(GOLDEN / "model.safetensors")
    for name in ("hf", "tower"):
        (tmp_path / name).mkdir()
    (tmp_path / "hf" / "config.json").write_text((GOLDEN / "config.json").read_text())
    tower = {name.removeprefix("vision_tower."): tensor for name, tensor in whole.items() if "vision_tower" in name}
    save_file(tower, tmp_path / "tower" / "model.safetensors")
    rest = {name: tensor for name, tensor in whole.items() if "vision_tower" not in name}
    save_file(rest, tmp_path / "hf" / "model.safetensors")
    arguments = ("--hf", tmp_path / "hf", "--family", "llava", "--output", tmp_path / "checkpoint")
    assert "--tower" in run("hf_to_megatron.py", *arguments).stderr
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


def test_a_mistake_is_one_clear_message(tmp_path):
    truncated = tmp_path / "hf"
    truncated.mkdir()
    (truncated / "config.json").write_text((GOLDEN / "config.json").read_text())
    (truncated / "model.safetensors").write_bytes((GOLDEN / "model.safetensors").read_bytes()[:-10])
    import_hf(tiny.write_release(tmp_path / "tiny", tiny.tensors()), None, [tiny.FAMILY], tmp_path / "other")
    output = ("--output", tmp_path / "output")
    for script, arguments, message in [
        ("hf_to_megatron.py", ("--hf", truncated, *output), "model.safetensors is no whole safetensors file"),
        ("hf_to_megatron.py", ("--hf", GOLDEN, "--family", "lava", *output), "llava"),
        ("megatron_to_hf.py", ("--checkpoint", tmp_path / "other", *output), "tiny"),
        ("show.py", (tmp_path,), "neither a megamm checkpoint"),
    ]:
        done = run(script, *arguments)
        assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert not (tmp_path / "output").exists()
