"""The LLaVA-1.5 recipes: published sizes and numbers, and launchers that reach the trainer."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from megamm.config.check import find_problems
from megamm.config.load import load_recipe

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "llava15"


def test_the_sizes_are_those_of_the_released_model() -> None:
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(LlavaConfig.from_json_file(str(FOLDER / "config-7b.json")))
    parameters = {name: sum(p.numel() for p in part.parameters()) for name, part in model.model.named_children()}
    assert parameters["vision_tower"] == 303_507_456
    assert parameters["multi_modal_projector"] == 20_979_712
    # 6,738,415,616 of Vicuna 7B less its head, and 64 more rows in the embedding
    assert parameters["language_model"] == 6_738_415_616 - 32000 * 4096 + 64 * 4096


@pytest.mark.parametrize(
    ("stage", "lr", "global_batch", "freeze", "aspect"),
    [("pretrain", 1e-3, 256, ("vision", "llm"), "square"), ("sft", 2e-5, 128, ("vision",), "pad")],
)
def test_a_recipe_has_the_published_numbers(
    stage: str, lr: float, global_batch: int, freeze: tuple[str, ...], aspect: str
) -> None:
    config = load_recipe(FOLDER / f"{stage}.py")
    assert not find_problems(config, world_size=8)
    assert (config.optim.lr, config.train.global_batch, config.train.freeze) == (lr, global_batch, freeze)
    assert (config.optim.schedule, config.optim.warmup, config.optim.weight_decay) == ("cosine", 0.03, 0.0)
    assert (config.train.epochs, config.data.max_tokens, config.data.aspect) == (1.0, 2048, aspect)
    assert config.model.config == str(FOLDER / "config-7b.json")


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
