"""The mPLUG-Owl2 recipes: published sizes and numbers, and the way from weights and conversations to an export."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from megamm.config.check import find_problems
from megamm.config.load import load_recipe
from megamm.models import mplug_owl2
from megamm.testing.tiny import tiny_tokenizer
from megamm.train import main

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "mplug_owl2"


def test_the_sizes_are_those_of_the_released_model() -> None:
    options = mplug_owl2.read(json.loads((FOLDER / "config-7b.json").read_text()))
    assert sum(entry.num_elements for entry in mplug_owl2.keys(options).entries()) == 8_197_859_328


@pytest.mark.parametrize(
    ("stage", "lr", "global_batch", "freeze", "aspect", "decay", "beta2"),
    [("pretrain", 1e-4, 8192, ("llm.text",), "stretch", 0.05, 0.98), ("sft", 2e-5, 256, (), "pad", 0.0, 0.999)],
)
def test_a_recipe_has_the_published_numbers(stage, lr, global_batch, freeze, aspect, decay, beta2) -> None:
    config = load_recipe(FOLDER / f"{stage}.py")
    assert not find_problems(config, world_size=8)
    assert (config.optim.lr, config.train.global_batch, config.train.freeze) == (lr, global_batch, freeze)
    assert (config.optim.weight_decay, config.optim.beta2, config.data.aspect) == (decay, beta2, aspect)
    assert (config.optim.schedule, config.train.precision, config.train.seed) == ("cosine", "bf16", 42)
    if stage == "pretrain":
        assert round(config.optim.warmup * config.train.steps) == 1000
    assert config.data.group_by_modality_length == (stage == "sft")


@pytest.mark.parametrize("recipe", ["pretrain.py", "sft.py"])
def test_a_dry_run_needs_no_weights(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert main([str(FOLDER / recipe), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "8 ranks" in out and ("the visual way" in out) == (recipe == "pretrain.py")


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
    (folder / "pretrain.json").write_text(json.dumps([item for item in items if "image" in item]))
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
    words = [word for name, path in inputs.items() for word in (f"--{name}", str(path))]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "PROCESSES": str(processes),
    }
    command = ["bash", str(FOLDER / "run.sh"), *words, *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=900)


@pytest.mark.slow
def test_the_whole_way_from_weights_and_conversations_to_an_export(inputs: dict[str, Path]) -> None:
    """Two steps of each stage, tiny: the visual way is trained twice, the text way in the second stage only."""
    options = "--train.steps 2 --train.global-batch 4 --train.micro-batch 2 --parallel.tp 1 --parallel.pp 2 "
    options += "--parallel.no-sequence-parallel --train.precision fp32 --data.num-workers 0 --data.max-tokens 256"
    done = run(inputs, "--image-size", "56", "--", *options.split(), processes=2)
    assert done.returncode == 0, done.stderr
    for stage in ("pretrain", "sft"):
        assert len((inputs["output"] / stage / "log.jsonl").read_text().splitlines()) == 2
    found = load_file(inputs["output"] / "export/model.safetensors")
    name = "model.layers.0.self_attn.k_proj"
    before = LlamaForCausalLM.from_pretrained(inputs["llm"]).get_parameter(f"{name}.weight")
    text, visual = ((before - found[f"{name}.multiway.{way}.weight"]).abs().max() for way in (0, 1))
    assert 0 < text < visual
    positions = found["model.vision_model.embeddings.position_embedding"]
    assert positions.shape == (1, 1 + 4 * 4, 32), "the second stage sees larger pictures"
    again = run(inputs, "--image-size", "56", "--", *options.split(), processes=2)
    assert again.returncode == 0 and "nothing to do" in again.stderr


def test_run_refuses_an_option_that_it_does_not_have(tmp_path: Path) -> None:
    done = run({"output": tmp_path}, "--size", "8b")
    assert done.returncode == 1 and "--size: no such option; there are --llm --tower" in done.stderr
