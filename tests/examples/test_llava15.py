"""The LLaVA-1.5 recipes: published sizes and numbers, and launchers that reach the trainer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from megamm.config.check import find_problems
from megamm.config.load import load_recipe
from megamm.testing.tiny import tiny_tokenizer
from megamm.train import main

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "llava15"


@pytest.mark.parametrize(
    ("size", "projector", "llm", "width"),
    [("7b", 20_979_712, 6_738_415_616, 4096), ("13b", 31_467_520, 13_015_864_320, 5120)],
)
def test_the_sizes_are_those_of_the_released_model(size: str, projector: int, llm: int, width: int) -> None:
    with torch.device("meta"):
        config = LlavaConfig.from_json_file(str(FOLDER / f"config-{size}.json"))
        model = LlavaForConditionalGeneration(config)
    parameters = {name: sum(p.numel() for p in part.parameters()) for name, part in model.model.named_children()}
    assert parameters["vision_tower"] == 303_507_456
    assert parameters["multi_modal_projector"] == projector
    # Vicuna less its head, and 64 more rows in the embedding
    assert parameters["language_model"] == llm - 32000 * width + 64 * width


@pytest.mark.parametrize(("suffix", "size"), [("", "7b"), ("_13b", "13b")])
@pytest.mark.parametrize(
    ("stage", "lr", "global_batch", "freeze", "aspect"),
    [("pretrain", 1e-3, 256, ("vision", "llm"), "square"), ("sft", 2e-5, 128, ("vision",), "pad")],
)
def test_a_recipe_has_the_published_numbers(
    stage: str, lr: float, global_batch: int, freeze: tuple[str, ...], aspect: str, suffix: str, size: str
) -> None:
    config = load_recipe(FOLDER / f"{stage}{suffix}.py")
    assert not find_problems(config, world_size=8)
    assert (config.optim.lr, config.train.global_batch, config.train.freeze) == (lr, global_batch, freeze)
    assert (config.optim.schedule, config.optim.warmup, config.optim.min_lr) == ("cosine", 0.03, 0.0)
    assert (config.optim.beta1, config.optim.beta2, config.optim.eps) == (0.9, 0.999, 1e-8)
    assert (config.optim.weight_decay, config.optim.projector_lr) == (0.0, None)
    assert (config.train.epochs, config.data.max_tokens, config.data.aspect) == (1.0, 2048, aspect)
    assert (config.train.precision, config.train.seed, config.data.shuffle) == ("bf16", 42, True)
    assert config.data.group_by_modality_length == (stage == "sft")
    assert config.model.config == str(FOLDER / f"config-{size}.json")


def test_the_sizes_do_not_share_a_folder() -> None:
    configs = [load_recipe(path) for path in sorted(FOLDER.glob("*.py"))]
    assert len(configs) == 4
    assert (
        len({config.checkpoint.dir for config in configs}) == len({config.model.pretrained for config in configs}) == 4
    )


@pytest.mark.parametrize("recipe", ["pretrain.py", "sft.py", "pretrain_13b.py", "sft_13b.py"])
def test_a_dry_run_needs_no_weights(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert main([str(FOLDER / recipe), "--dry-run"]) == 0
    assert "8 ranks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"PROCESSES": "4"}, "--nproc-per-node 4 --standalone -m megamm.train recipe.py --parallel.tp 2"),
        (
            {"PROCESSES": "8", "NODES": "2", "NODE_RANK": "1", "MASTER": "host7"},
            "--nproc-per-node 8 --nnodes 2 --node-rank 1 --master-addr host7 --master-port 29500 -m megamm.train",
        ),
    ],
)
def test_torchrun_is_started_as_documented(tmp_path: Path, environment: dict[str, str], expected: str) -> None:
    """The launcher runs in a copy of its folder, with a `python` that prints what it was given."""
    launcher = tmp_path / "examples" / "launch" / "torchrun.sh"
    python = tmp_path / ".venv" / "bin" / "python"
    launcher.parent.mkdir(parents=True)
    python.parent.mkdir(parents=True)
    launcher.write_text((ROOT / "examples" / "launch" / "torchrun.sh").read_text())
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    command = ["bash", str(launcher), "recipe.py", "--parallel.tp", "2"]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
    assert f"examples/launch/torchrun.py {expected}" in done.stdout


def test_several_machines_need_a_number_and_a_master() -> None:
    command = ["bash", str(ROOT / "examples" / "launch" / "torchrun.sh"), "recipe.py"]
    done = subprocess.run(command, env=os.environ | {"NODES": "2"}, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "NODE_RANK: set it to the number of this machine" in done.stderr


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    """What run.sh starts from, tiny: an llm with its tokenizer, a tower, two sets of conversations and pictures."""
    folder = tmp_path / "inputs"
    llm, tower, images = folder / "llm", folder / "tower", folder / "images"
    images.mkdir(parents=True)
    items = []
    for i in range(12):
        Image.new("RGB", (40, 30 + i), (20 * i, 100, 200)).save(images / f"{i}.png")
        picture = {} if i % 4 == 3 else {"image": f"{i}.png"}
        question = "What is it?" if i % 4 == 3 else "<image>\nWhat is it?"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": f"number {i}"}]
        items.append({"id": str(i), **picture, "conversations": turns})
    captions = [item for item in items if "image" in item]
    (folder / "pretrain.json").write_text(json.dumps(captions))
    (folder / "sft.json").write_text(json.dumps(items))
    tiny_tokenizer(llm, [turn["value"] for item in items for turn in item["conversations"]] * 20)
    sizes = {"num_attention_heads": 4, "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=512, **sizes)).save_pretrained(llm)
    CLIPVisionModel(CLIPVisionConfig(image_size=28, patch_size=14, **sizes)).save_pretrained(tower)
    return {
        "llm": llm,
        "tower": tower,
        "pretrain-json": folder / "pretrain.json",
        "pretrain-images": images,
        "sft-json": folder / "sft.json",
        "sft-images": images,
        "output": tmp_path / "out",
    }


def run(inputs: dict[str, Path], *options: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    return run_script(FOLDER, inputs, *options, processes=processes)


def run_script(
    folder: Path, inputs: dict[str, Path], *options: str, processes: int = 1
) -> subprocess.CompletedProcess[str]:
    """The run.sh of that folder of examples."""
    words = [word for name, path in inputs.items() for word in (f"--{name}", str(path))]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "PROCESSES": str(processes),
    }
    command = ["bash", str(folder / "run.sh"), *words, *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=900)


@pytest.mark.slow
def test_the_whole_way_from_weights_and_conversations_to_an_export(inputs: dict[str, Path]) -> None:
    """Two steps of each stage, tiny. The tower stays, the projector is trained twice, the llm in the second stage."""
    options = "--train.steps 2 --train.global-batch 4 --train.micro-batch 2 --parallel.tp 1 --parallel.pp 2 "
    options += "--parallel.no-sequence-parallel --train.precision fp32 --data.num-workers 0 --data.max-tokens 256"
    done = run(inputs, "--", *options.split(), processes=2)
    assert done.returncode == 0, done.stderr
    out = inputs["output"]
    for stage in ("pretrain", "sft"):
        assert len((out / stage / "log.jsonl").read_text().splitlines()) == 2
    model = AutoModelForImageTextToText.from_pretrained(out / "export")
    llm = LlamaForCausalLM.from_pretrained(inputs["llm"])
    tower = CLIPVisionModel.from_pretrained(inputs["tower"]).state_dict()
    found = model.model.vision_tower.state_dict()
    assert found.keys() == tower.keys() and all(torch.equal(found[name], tensor) for name, tensor in tower.items())
    name = "layers.0.mlp.up_proj.weight"
    before, after = llm.model.get_parameter(name), model.model.language_model.get_parameter(name)
    assert 0 < (before - after).abs().max() < 1e-4
    again = run(inputs, "--", *options.split(), processes=2)
    assert again.returncode == 0 and "nothing to do" in again.stderr


@pytest.mark.parametrize("name", ["llm", "tower", "pretrain-json", "pretrain-images", "sft-json", "sft-images"])
def test_run_refuses_an_input_that_is_absent(name: str, tmp_path: Path) -> None:
    inputs = {}
    for other in ("llm", "tower", "pretrain-json", "pretrain-images", "sft-json", "sft-images"):
        inputs[other] = tmp_path / other
        (inputs[other].touch if other.endswith("json") else inputs[other].mkdir)()
    inputs["output"] = tmp_path / "out"
    done = run(inputs | {name: tmp_path / "absent"})
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith(f"error: --{name} {tmp_path}/absent: no such f")
    assert not (tmp_path / "out").exists()
    without = {key: path for key, path in inputs.items() if key != name}
    assert f"error: --{name} is missing" in run(without).stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sise", "13b"], "--sise: no such option; there are --llm --tower"),
        (["--size", "8b"], "--size 8b: there are 7b and 13b"),
    ],
)
def test_run_refuses_options_that_it_does_not_have(options: list[str], message: str, tmp_path: Path) -> None:
    folders = dict.fromkeys(("llm", "tower", "pretrain-images", "sft-images", "output"), tmp_path)
    (tmp_path / "set.json").touch()
    done = run(folders | dict.fromkeys(("pretrain-json", "sft-json"), tmp_path / "set.json"), *options)
    assert done.returncode == 1 and message in done.stderr
