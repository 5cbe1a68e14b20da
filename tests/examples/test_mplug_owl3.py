"""The mPLUG-Owl3 recipes: published sizes and numbers, dry runs, and the whole way through run.sh."""

import io
import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from megamm.config.check import find_problems
from megamm.config.load import load_recipe
from megamm.data.indexed import Reader
from megamm.models import mplug_owl3
from megamm.models.build import units
from tests.examples import recipes
from tests.examples.recipes import EXAMPLES, dry_run, item, run

FOLDER = EXAMPLES / "mplug_owl3"
STAGES = ("pretrain", "interleaved", "sft")
UNUSED = 15_239_504 + 2_304 + 15_238_352
"""The tower's last block, last norm and head, which are kept and never built."""


@pytest.mark.parametrize(
    ("name", "parameters", "kind"),
    [("config-7b.json", 8_061_197_888, "gated"), ("config-7b-241101.json", 8_072_546_880, "joint")],
)
def test_the_sizes_are_those_of_the_released_model(name: str, parameters: int, kind: str) -> None:
    options = mplug_owl3.read(json.loads((FOLDER / name).read_text()))
    assert options.llm.hyper is not None and options.llm.hyper.kind == kind
    padding = 2 * (options.llm.padded_vocab_size - options.llm.vocab_size) * options.llm.hidden_size
    found = sum(unit.parameters for unit in units(options, num_tokens=1, num_images=1, seq_length=1))
    assert found == parameters - UNUSED + padding


@pytest.mark.parametrize(
    ("stage", "lr", "min_lr", "global_batch", "steps", "max_tokens", "freeze"),
    [
        ("pretrain", 1e-3, 1e-5, 2048, 20_000, 768, ("vision", "llm.text")),
        ("interleaved", 2e-5, 1e-7, 1024, 3_000, 4096, ("vision",)),
        ("sft", 2e-5, 1e-7, 1024, 11_000, 4096, ("vision",)),
    ],
)
def test_a_recipe_has_the_published_numbers(
    stage: str, lr: float, min_lr: float, global_batch: int, steps: int, max_tokens: int, freeze: tuple[str, ...]
) -> None:
    config = load_recipe(FOLDER / f"{stage}.py")
    assert not find_problems(config, world_size=8)
    assert (config.optim.lr, config.optim.min_lr, config.train.global_batch) == (lr, min_lr, global_batch)
    assert (config.train.steps, config.data.max_tokens, config.train.freeze) == (steps, max_tokens, freeze)
    assert (config.optim.schedule, config.optim.warmup, config.data.aspect) == ("cosine", 0.03, "square")


def test_the_recipes_do_not_share_a_folder() -> None:
    configs = [load_recipe(FOLDER / f"{stage}.py") for stage in STAGES]
    assert len({config.checkpoint.dir for config in configs}) == len({config.data.path for config in configs}) == 3


@pytest.mark.parametrize("stage", STAGES)
def test_a_dry_run_needs_no_weights(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dry_run(FOLDER / f"{stage}.py", tmp_path, monkeypatch) == 0
    assert "8 ranks" in capsys.readouterr().out


def clip() -> bytes:
    """A second and a half of grey."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=2)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for i in range(6):
            grey = np.full((32, 32, 3), 40 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def byte_tokenizer(directory: Path) -> None:
    """A tokenizer of single bytes, with Qwen2's special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.save_pretrained(directory)


def save_llm(directory: Path) -> None:
    byte_tokenizer(directory)
    sizes = dict(vocab_size=300, max_position_embeddings=2048, num_key_value_heads=2, **recipes.SIZES)
    Qwen2ForCausalLM(Qwen2Config(**sizes)).save_pretrained(directory)


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    """Captions, then several pictures or a video, then conversations about a picture or none."""
    sets: dict[str, list[dict[str, Any]]] = {stage: [] for stage in STAGES}
    for i in range(8):
        image = f"{i}.png"
        sets["pretrain"].append(item(i, "<image>\nDescribe it.", image=image))
        several = item(i, "One: <image> Another: <image>", image=[image, "0.png"])
        sets["interleaved"].append(several if i % 2 else item(i, "<video>\nWhat happens?", video="clip.mp4"))
        sets["sft"].append(item(i, "What is it?") if i % 4 == 3 else item(i, "<image>\nWhat is it?", image=image))
    inputs = recipes.write_inputs(tmp_path, save_llm, recipes.save_siglip, sets)
    (inputs["interleaved-images"] / "clip.mp4").write_bytes(clip())
    return inputs


@pytest.mark.slow
def test_the_whole_way_from_weights_and_conversations_to_an_export(inputs: dict[str, Path]) -> None:
    """Two steps of each stage, tiny. Of the llm the first stage trains what visual tokens go through only."""
    done = run("mplug_owl3", inputs, "--", *recipes.short(max_tokens=1024))
    assert done.returncode == 0, done.stderr
    assert [recipes.num_steps(inputs, stage) for stage in STAGES] == [2, 2, 2]
    out = inputs["output"]
    views = {stage: Reader(out / "data" / stage).num_images.tolist() for stage in STAGES}
    assert views["pretrain"] == [1] * 8 and views["interleaved"] == [3, 2] * 4
    assert views["sft"][3] == 0 and set(views["sft"]) <= {0, 5, 7} and max(views["sft"]) > 1

    found, tower = (load_file(path / "model.safetensors") for path in (out / "export", inputs["tower"]))
    theirs = {f"vision_model.{key.removeprefix('vision_model.')}": tensor for key, tensor in tower.items()}
    assert all(torch.equal(found[key], tensor) for key, tensor in theirs.items())
    llm = load_file(inputs["llm"] / "model.safetensors")
    assert (
        0
        < (found["language_model.model.layers.0.mlp.up_proj.weight"] - llm["model.layers.0.mlp.up_proj.weight"])
        .abs()
        .max()
        < 1e-4
    )
    config = json.loads((out / "export" / "config.json").read_text())
    assert (config["model_type"], config["hyper_layers"]) == ("mplugowl3", [1])
    assert AutoTokenizer.from_pretrained(out / "export").eos_token == "<|im_end|>"


def test_run_refuses_an_input_that_is_absent(tmp_path: Path) -> None:
    done = run("mplug_owl3", {"llm": tmp_path})
    assert done.returncode == 1 and "error: --tower is missing" in done.stderr
