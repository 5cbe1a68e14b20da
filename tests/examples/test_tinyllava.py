"""The TinyLLaVA recipes: published sizes and numbers, and a script that goes all the way."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megamm.config.check import find_problems
from megamm.config.load import load_recipe
from megamm.models.build import units
from megamm.registry import family
from tests.examples import recipes
from tests.examples.recipes import EXAMPLES, dry_run, run

FOLDER = EXAMPLES / "tinyllava"
RECIPES = {
    # recipe: learning rate, global batch, frozen, picture, tokens
    "pretrain": (1e-3, 256, ("vision", "llm"), "square", 3072),
    "sft": (2e-5, 128, ("vision",), "pad", 3072),
    "share_pretrain": (2e-5, 256, ("vision[:12]",), "square", 3072),
    "share_sft": (2e-5, 128, ("vision",), "pad", 3072),
    "factory_pretrain": (1e-3, 256, ("vision", "llm"), "square", 2048),
    "factory_sft": (2e-5, 128, ("vision",), "square", 2048),
}


@pytest.mark.parametrize(
    ("name", "parameters", "tokens"),
    [
        ("bench-phi2", 3_186_885_920 + 51200, 729),
        ("factory-phi2", 3_186_885_920 + 51200, 728),
        ("factory-tinyllama", 1_504_351_520, 728),
        ("factory-stablelm2", 2_048_818_464, 728),
        ("factory-qwen2", 494_032_768 + 397_745_440 + 1_836_800, 728),
    ],
)
def test_the_sizes_are_those_of_the_released_models(name: str, parameters: int, tokens: int) -> None:
    options = family("tinyllava").read(json.loads((FOLDER / name / "config.json").read_text()), None)
    assert options.tokens_per_image == tokens
    assert sum(unit.parameters for unit in units(options, num_tokens=1, num_images=1, seq_length=1)) == parameters


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_has_the_published_numbers(recipe: str) -> None:
    config = load_recipe(FOLDER / f"{recipe}.py")
    assert not find_problems(config, world_size=8)
    found = (config.optim.lr, config.train.global_batch, config.train.freeze, config.data.aspect)
    assert (*found, config.data.max_tokens) == RECIPES[recipe]
    assert (config.optim.schedule, config.optim.warmup, config.optim.weight_decay) == ("cosine", 0.03, 0.0)
    assert config.data.group_by_modality_length == recipe.endswith("sft")
    assert (config.train.epochs, config.train.precision) == (1.0, "bf16")


def test_the_recipes_do_not_share_a_folder() -> None:
    configs = [load_recipe(FOLDER / f"{recipe}.py") for recipe in RECIPES]
    assert len({config.checkpoint.dir for config in configs}) == len({config.data.path for config in configs}) == 6


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_dry_run_needs_no_weights(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    assert dry_run(FOLDER / f"{recipe}.py", tmp_path, monkeypatch) == 0
    assert ("from layer 12" in capsys.readouterr().out) == (recipe == "share_pretrain")


def test_more_frozen_layers_than_there_are_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    assert dry_run(FOLDER / "sft.py", tmp_path, monkeypatch, "--train.freeze", "vision[:27]") != 0
    assert "train.freeze=vision[:27]: the vision has 26 layers" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.slow
def test_the_whole_way_from_weights_and_conversations_to_an_export(tmp_path: Path) -> None:
    """The Factory's two stages, two steps each. The tower stays as it was, its unused parts included."""
    inputs = recipes.write_inputs(tmp_path, recipes.save_llama, recipes.save_siglip)
    options = ("--recipe", "factory", "--decoder", "tinyllama", "--", *recipes.short(max_tokens=256))
    done = run("tinyllava", inputs, *options)
    assert done.returncode == 0, done.stderr
    assert [recipes.num_steps(inputs, stage) for stage in ("pretrain", "sft")] == [2, 2]
    export = inputs["output"] / "export"
    config, found = json.loads((export / "config.json").read_text()), load_file(export / "model.safetensors")
    assert (config["model_type"], config["vision_feature_select_strategy"]) == ("tinyllava", "patch")
    tower = load_file(inputs["tower"] / "model.safetensors")
    kept = {name.split("vision_model.", 1)[1]: t for name, t in found.items() if "vision_tower" in name}
    assert kept.keys() == {name.removeprefix("vision_model.") for name in tower}
    assert all(torch.equal(kept[name.removeprefix("vision_model.")], tensor) for name, tensor in tower.items())
    name = "model.layers.0.mlp.up_proj.weight"
    before = load_file(inputs["llm"] / "model.safetensors")[name]
    assert 0 < (before - found[f"language_model.{name}"]).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recipe", "shared"], "--recipe shared: there are base, share and factory"),
        (["--recipe", "share"], "--share-json is missing"),
        (["--decoder", "qwen2"], "--decoder qwen2 needs --recipe factory"),
        (["--recipe", "factory", "--decoder", "gemma"], "--decoder gemma: there are phi2, tinyllama, stablelm2 and"),
        (["--size", "7b"], "--size: no such option; there are --llm --tower"),
    ],
)
def test_run_refuses_what_it_does_not_have(options: list[str], message: str, tmp_path: Path) -> None:
    done = run("tinyllava", recipes.empty_inputs(tmp_path), *options)
    assert done.returncode == 1 and message in done.stderr
