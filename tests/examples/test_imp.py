"""The Imp recipes: published sizes and numbers, dry runs, and the whole way through run.sh."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from megamm.config.check import find_problems
from megamm.config.load import load_recipe
from megamm.models import imp
from megamm.models.build import units
from megamm.testing.tiny import tiny_byte_tokenizer
from tests.examples import recipes
from tests.examples.recipes import EXAMPLES, dry_run, run

FOLDER = EXAMPLES / "imp"
MODELS = {"phi2": "", "qwen1_5": "_qwen1_5", "phi3": "_phi3"}


@pytest.mark.parametrize(
    ("model", "parameters"),
    [("phi2", 3_186_937_120), ("qwen1_5", 2_241_131_808), ("phi3", 4_231_807_264 + 2 * 64 * 3072)],
)
def test_the_sizes_are_those_of_the_released_model(model: str, parameters: int) -> None:
    """Phi-3's vocabulary is padded by 64 rows."""
    options = imp.read(json.loads((FOLDER / f"config-{model}.json").read_text()))
    assert sum(unit.parameters for unit in units(options, num_tokens=1, num_images=1, seq_length=1)) == parameters


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("stage", "lr", "global_batch", "freeze", "epochs"),
    [("pretrain", 1e-3, 256, ("vision", "llm"), 1), ("sft", 2e-5, 128, ("vision",), 2)],
)
def test_a_recipe_has_the_published_numbers(
    stage: str, lr: float, global_batch: int, freeze: tuple[str, ...], epochs: int, model: str
) -> None:
    config = load_recipe(FOLDER / f"{stage}{MODELS[model]}.py")
    assert not find_problems(config, world_size=8)
    assert (config.optim.lr, config.train.global_batch, config.train.freeze) == (lr, global_batch, freeze)
    assert (config.optim.schedule, config.optim.warmup, config.optim.min_lr) == ("cosine", 0.03, 0.0)
    assert (config.optim.beta1, config.optim.beta2, config.optim.eps) == (0.9, 0.999, 1e-8)
    assert (config.optim.weight_decay, config.train.epochs, config.train.seed) == (0.0, epochs, 42)
    assert config.data.max_tokens == (3072 if model == "phi2" else 2560)
    assert config.data.aspect == ("pad" if (model, stage) == ("phi3", "sft") else "square")
    assert config.data.group_by_modality_length == (stage == "sft")
    assert config.model.config == str(FOLDER / f"config-{model}.json")


def test_the_recipes_do_not_share_a_folder() -> None:
    configs = [
        load_recipe(FOLDER / f"{stage}{suffix}.py") for stage in ("pretrain", "sft") for suffix in MODELS.values()
    ]
    assert len({config.checkpoint.dir for config in configs}) == len({config.data.path for config in configs}) == 6


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
@pytest.mark.parametrize("suffix", MODELS.values(), ids=MODELS)
def test_a_dry_run_needs_no_weights(
    stage: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dry_run(FOLDER / f"{stage}{suffix}.py", tmp_path, monkeypatch) == 0
    assert "8 ranks" in capsys.readouterr().out


LLMS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "phi2": ("phi", {"hidden_act": "gelu_new", "partial_rotary_factor": 0.5}, ()),
    "qwen1_5": ("qwen2", {"num_key_value_heads": 2}, ("<|im_start|>", "<|im_end|>")),
    "phi3": ("phi3", {"pad_token_id": 0}, ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")),
}


def save_llm(directory: Path, model: str) -> None:
    model_type, more, special = LLMS[model]
    tiny_byte_tokenizer(directory, *special)
    config = AutoConfig.for_model(model_type, vocab_size=300, max_position_embeddings=512, **recipes.SIZES, **more)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_the_whole_way_from_weights_and_conversations_to_an_export(model: str, tmp_path: Path) -> None:
    """Two steps of each stage, tiny. The tower stays, projector and llm move; the export is read by its tokenizer."""
    inputs = recipes.write_inputs(tmp_path, partial(save_llm, model=model), recipes.save_siglip)
    done = run("imp", inputs, "--model", model, "--", *recipes.short(max_tokens=512))
    assert done.returncode == 0, done.stderr
    assert [recipes.num_steps(inputs, stage) for stage in ("pretrain", "sft")] == [2, 2]
    out = inputs["output"]
    found, llm, tower = (
        load_file(path / "model.safetensors") for path in (out / "export", inputs["llm"], inputs["tower"])
    )
    prefix = "model.vision_tower.vision_tower."
    ours = {key.removeprefix(prefix): tensor for key, tensor in found.items() if key.startswith(prefix)}
    theirs = {f"vision_model.{key.removeprefix('vision_model.')}": tensor for key, tensor in tower.items()}
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    name = "model.layers.0.mlp.fc2.weight" if model == "phi2" else "model.layers.0.mlp.down_proj.weight"
    assert 0 < (found[name] - llm[name]).abs().max() < 1e-4
    tokenizer = AutoTokenizer.from_pretrained(out / "export")
    assert (tokenizer.eos_token == "</s>") == (model == "phi2")
    config = json.loads((out / "export" / "config.json").read_text())
    assert config["model_type"] in ("imp", "imp_qwen2", "imp_phi3")
    assert config["eos_token_id"] == (tokenizer.eos_token_id if model == "phi2" else config["eos_token_id"])
    assert imp.read(config).vision.num_layers == 1


def test_run_refuses_a_model_that_it_does_not_have(tmp_path: Path) -> None:
    done = run("imp", recipes.empty_inputs(tmp_path), "--model", "gemma")
    assert done.returncode == 1 and "--model gemma: there are phi2, qwen1_5 and phi3" in done.stderr
