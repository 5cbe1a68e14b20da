"""The mPLUG-Owl2 recipes: published sizes and numbers, and the way from weights and conversations to an export."""

import json
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from megamm.config.check import find_problems
from megamm.config.load import load_recipe
from megamm.models import mplug_owl2
from tests.examples import recipes
from tests.examples.recipes import EXAMPLES, dry_run, run

FOLDER = EXAMPLES / "mplug_owl2"


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
    assert dry_run(FOLDER / recipe, tmp_path, monkeypatch) == 0
    out = capsys.readouterr().out
    assert "8 ranks" in out and ("the visual way" in out) == (recipe == "pretrain.py")


@pytest.mark.parametrize(
    ("freeze", "expected"),
    [
        (["llm"], [("0-31", "frozen")]),
        (["llm.text"], [("0-31", "yes")]),
        (["llm[:1]"], [("0", "frozen"), ("1-31", "yes")]),
    ],
)
def test_a_dry_run_says_what_of_the_visual_way_is_trained(freeze, expected, tmp_path, monkeypatch, capsys) -> None:
    assert dry_run(FOLDER / "sft.py", tmp_path, monkeypatch, "--train.freeze", *freeze) == 0
    found = re.findall(r"llm\.layer\.(\S+)\.visual .*among these .* (frozen|yes) ", capsys.readouterr().out)
    assert found == expected


@pytest.mark.slow
def test_the_whole_way_from_weights_and_conversations_to_an_export(tmp_path: Path) -> None:
    """Two steps of each stage, tiny: the visual way is trained twice, the text way in the second stage only."""
    inputs = recipes.write_inputs(tmp_path, recipes.save_llama, recipes.save_clip)
    done = run("mplug_owl2", inputs, "--image-size", "56", "--", *recipes.short(max_tokens=256))
    assert done.returncode == 0, done.stderr
    assert [recipes.num_steps(inputs, stage) for stage in ("pretrain", "sft")] == [2, 2]
    found = load_file(inputs["output"] / "export/model.safetensors")
    name = "model.layers.0.self_attn.k_proj"
    before = LlamaForCausalLM.from_pretrained(inputs["llm"]).get_parameter(f"{name}.weight")
    text, visual = ((before - found[f"{name}.multiway.{way}.weight"]).abs().max() for way in (0, 1))
    assert 0 < text < visual
    positions = found["model.vision_model.embeddings.position_embedding"]
    assert positions.shape == (1, 1 + 4 * 4, 32), "the second stage sees larger pictures"


def test_run_refuses_an_option_that_it_does_not_have(tmp_path: Path) -> None:
    done = run("mplug_owl2", {"output": tmp_path}, "--size", "8b")
    assert done.returncode == 1 and "--size: no such option; there are --llm --tower" in done.stderr
