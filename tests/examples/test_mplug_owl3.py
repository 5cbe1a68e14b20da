"""The mPLUG-Owl3 recipes: published sizes and numbers, dry runs, and the whole way through run.sh."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from megamm.config.check import find_problems
from megamm.config.load import load_recipe
from megamm.data.indexed import Reader
from megamm.models import mplug_owl3
from megamm.models.build import units
from megamm.train import main

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "mplug_owl3"
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
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert main([str(FOLDER / f"{stage}.py"), "--dry-run"]) == 0
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


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    """What run.sh starts from, tiny: an llm with its tokenizer, a tower, three sets of conversations and pictures."""
    folder = tmp_path / "inputs"
    llm, tower, images = folder / "llm", folder / "tower", folder / "images"
    images.mkdir(parents=True)
    (images / "clip.mp4").write_bytes(clip())
    sets: dict[str, list[dict[str, Any]]] = {stage: [] for stage in STAGES}
    for i in range(8):
        Image.new("RGB", (40, 30 + i), (20 * i, 100, 200)).save(images / f"{i}.png")

        def item(question: str, i: int = i, **media: Any) -> dict[str, Any]:
            turns = [{"from": "human", "value": question}, {"from": "gpt", "value": f"number {i}"}]
            return {"id": str(i), **media, "conversations": turns}

        sets["pretrain"].append(item("<image>\nDescribe it.", image=f"{i}.png"))
        several = item("One: <image> Another: <image>", image=[f"{i}.png", "0.png"])
        sets["interleaved"].append(several if i % 2 else item("<video>\nWhat happens?", video="clip.mp4"))
        sets["sft"].append(item("What is it?") if i % 4 == 3 else item("<image>\nWhat is it?", image=f"{i}.png"))
    byte_tokenizer(llm)
    sizes = {"num_attention_heads": 4, "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64}
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=300, max_position_embeddings=2048, num_key_value_heads=2, **sizes)
    Qwen2ForCausalLM(config).save_pretrained(llm)
    SiglipVisionModel(SiglipVisionConfig(image_size=28, patch_size=14, **sizes)).save_pretrained(tower)
    found = {"llm": llm, "tower": tower, "output": tmp_path / "out"}
    for stage in STAGES:
        (folder / f"{stage}.json").write_text(json.dumps(sets[stage]))
        found |= {f"{stage}-json": folder / f"{stage}.json", f"{stage}-images": images}
    return found


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
    """Two steps of each stage, tiny. Of the llm the first stage trains what visual tokens go through only."""
    options = "--train.steps 2 --train.global-batch 4 --train.micro-batch 2 --parallel.tp 1 --parallel.pp 2 "
    options += "--parallel.no-sequence-parallel --train.precision fp32 --data.num-workers 0 --data.max-tokens 1024"
    done = run(inputs, "--", *options.split(), processes=2)
    assert done.returncode == 0, done.stderr
    out = inputs["output"]
    assert all(len((out / stage / "log.jsonl").read_text().splitlines()) == 2 for stage in STAGES)
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
    done = run({"llm": tmp_path})
    assert done.returncode == 1 and "error: --tower is missing" in done.stderr
