"""The LLaVA-1.5 recipes: published sizes and numbers, and launchers that reach the trainer."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionModel,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from megamm.config.check import find_problems
from megamm.config.load import load_recipe
from tests.examples import recipes
from tests.examples.recipes import EXAMPLES, dry_run, run

FOLDER = EXAMPLES / "llava15"


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
    assert dry_run(FOLDER / recipe, tmp_path, monkeypatch) == 0
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
    launcher.write_text((EXAMPLES / "launch" / "torchrun.sh").read_text())
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    command = ["bash", str(launcher), "recipe.py", "--parallel.tp", "2"]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
    assert f"examples/launch/torchrun.py {expected}" in done.stdout


def test_several_machines_need_a_number_and_a_master() -> None:
    command = ["bash", str(EXAMPLES / "launch" / "torchrun.sh"), "recipe.py"]
    done = subprocess.run(command, env=os.environ | {"NODES": "2"}, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "NODE_RANK: set it to the number of this machine" in done.stderr


@pytest.mark.slow
def test_the_whole_way_from_weights_and_conversations_to_an_export(tmp_path: Path) -> None:
    """Two steps of each stage, tiny. The tower stays, the projector is trained twice, the llm in the second stage."""
    inputs = recipes.write_inputs(tmp_path, recipes.save_llama, recipes.save_clip)
    done = run("llava15", inputs, "--", *recipes.short(max_tokens=256))
    assert done.returncode == 0, done.stderr
    assert [recipes.num_steps(inputs, stage) for stage in ("pretrain", "sft")] == [2, 2]
    model = AutoModelForImageTextToText.from_pretrained(inputs["output"] / "export")
    llm = LlamaForCausalLM.from_pretrained(inputs["llm"])
    tower = CLIPVisionModel.from_pretrained(inputs["tower"]).state_dict()
    found = model.model.vision_tower.state_dict()
    assert found.keys() == tower.keys() and all(torch.equal(found[name], tensor) for name, tensor in tower.items())
    name = "layers.0.mlp.up_proj.weight"
    before, after = llm.model.get_parameter(name), model.model.language_model.get_parameter(name)
    assert 0 < (before - after).abs().max() < 1e-4
    again = run("llava15", inputs, "--", *recipes.short(max_tokens=256))
    assert again.returncode == 0 and "nothing to do" in again.stderr


@pytest.mark.parametrize("name", ["llm", "tower", "pretrain-json", "pretrain-images", "sft-json", "sft-images"])
def test_run_refuses_an_input_that_is_absent(name: str, tmp_path: Path) -> None:
    inputs = recipes.empty_inputs(tmp_path)
    done = run("llava15", inputs | {name: tmp_path / "absent"})
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith(f"error: --{name} {tmp_path}/absent: no such f")
    assert not inputs["output"].exists()
    without = {key: path for key, path in inputs.items() if key != name}
    assert f"error: --{name} is missing" in run("llava15", without).stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sise", "13b"], "--sise: no such option; there are --llm --tower"),
        (["--size", "8b"], "--size 8b: there are 7b and 13b"),
    ],
)
def test_run_refuses_options_that_it_does_not_have(options: list[str], message: str, tmp_path: Path) -> None:
    done = run("llava15", recipes.empty_inputs(tmp_path), *options)
    assert done.returncode == 1 and message in done.stderr
