"""What the tests of the recipes share: tiny inputs of a run.sh, the run itself, and a dry run."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from megamm.testing.tiny import tiny_tokenizer
from megamm.train import main

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SIZES = {"num_attention_heads": 4, "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64}
"""Of a tiny llm and of a tiny tower."""


def dry_run(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    """The exit status of a dry run for 8 ranks, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "8")
    return main([str(recipe), "--dry-run", *options])


def item(i: int, question: str, **media: Any) -> dict[str, Any]:
    """One conversation in LLaVA's form."""
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": f"number {i}"}]
    return {"id": str(i), **media, "conversations": turns}


CONVERSATIONS = [
    item(i, "What is it?") if i % 4 == 3 else item(i, "<image>\nWhat is it?", image=f"{i}.png") for i in range(12)
]
SETS = {"pretrain": [each for each in CONVERSATIONS if "image" in each], "sft": CONVERSATIONS}


def write_inputs(
    tmp_path: Path,
    save_llm: Callable[[Path], None],
    save_tower: Callable[[Path], None],
    sets: dict[str, list[dict[str, Any]]] = SETS,
) -> dict[str, Path]:
    """What run.sh starts from, tiny: an llm with its tokenizer, a tower, sets of conversations, twelve pictures."""
    folder = tmp_path / "inputs"
    images = folder / "images"
    images.mkdir(parents=True)
    for i in range(12):
        Image.new("RGB", (40, 30 + i), (20 * i, 100, 200)).save(images / f"{i}.png")
    inputs = {"llm": folder / "llm", "tower": folder / "tower", "output": tmp_path / "out"}
    for name, items in sets.items():
        inputs |= {f"{name}-json": folder / f"{name}.json", f"{name}-images": images}
        inputs[f"{name}-json"].write_text(json.dumps(items))
    torch.manual_seed(0)
    save_llm(inputs["llm"])
    save_tower(inputs["tower"])
    return inputs


def save_llama(directory: Path) -> None:
    texts = [turn["value"] for conversation in CONVERSATIONS for turn in conversation["conversations"]]
    tiny_tokenizer(directory, texts * 20)
    LlamaForCausalLM(LlamaConfig(vocab_size=512, **SIZES)).save_pretrained(directory)


def save_clip(directory: Path) -> None:
    CLIPVisionModel(CLIPVisionConfig(image_size=28, patch_size=14, **SIZES)).save_pretrained(directory)


def save_siglip(directory: Path) -> None:
    SiglipVisionModel(SiglipVisionConfig(image_size=28, patch_size=14, **SIZES)).save_pretrained(directory)


def empty_inputs(tmp_path: Path) -> dict[str, Path]:
    """Folders and files that are there, with nothing in them, and an output folder that is not."""
    inputs = {name: tmp_path / name for name in ("llm", "tower")}
    inputs |= {f"{name}-{kind}": tmp_path / f"{name}-{kind}" for name in SETS for kind in ("json", "images")}
    for name, path in inputs.items():
        (path.touch if name.endswith("json") else path.mkdir)()
    return inputs | {"output": tmp_path / "out"}


def short(max_tokens: int) -> list[str]:
    """Options of a training of two steps over two pipeline stages, without sequence parallelism."""
    train = "--train.steps 2 --train.global-batch 4 --train.micro-batch 2 --train.precision fp32"
    parallel = "--parallel.tp 1 --parallel.pp 2 --parallel.no-sequence-parallel"
    return [*train.split(), *parallel.split(), "--data.num-workers", "0", "--data.max-tokens", str(max_tokens)]


def run(family: str, inputs: dict[str, Path], *options: str) -> subprocess.CompletedProcess[str]:
    """The run.sh of that folder of examples, on two ranks."""
    words = [word for name, path in inputs.items() for word in (f"--{name}", str(path))]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "PROCESSES": "2",
    }
    command = ["bash", str(EXAMPLES / family / "run.sh"), *words, *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=900)


def num_steps(inputs: dict[str, Path], stage: str) -> int:
    """Steps that a training of run.sh has logged."""
    return len((inputs["output"] / stage / "log.jsonl").read_text().splitlines())
