"""An export in transformers' own LLaVA class is all that stock inference takes: prompt, pixels and ids are ours."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from megamm.batch import IMAGE
from megamm.config.schema import Data
from megamm.data.image import to_pixels
from megamm.data.template import template
from megamm.data.text import tokenise
from megamm.data.tokenizer import load_tokenizer
from megamm.errors import CheckpointError
from megamm.models.vision.vit import Normalise
from megamm.registry import family
from megamm.testing.tiny import tiny_tokenizer
from megamm.training.setup import image_format
from megamm.weights.convert import open_start, write_checkpoint
from megamm.weights.directory import read_info

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools" / "checkpoint"))

from megatron_to_hf import megatron_to_hf  # noqa: E402 - a script

QUESTION, ANSWER = "What is it?", "number 7"
SIZES = {"num_attention_heads": 4, "num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 64}
TOWERS = {
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(image_size=30, patch_size=14, **SIZES)),
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(image_size=28, patch_size=14, **SIZES)),
}


def checkpoint(directory: Path, tower: str, **changes: object) -> None:
    """A TinyLLaVA start of a tiny Llama with its tokenizer, and a tiny tower; `changes`: to its config.json."""
    torch.manual_seed(0)
    tiny_tokenizer(directory / "llm", [QUESTION, ANSWER] * 20)
    LlamaForCausalLM(LlamaConfig(vocab_size=512, **SIZES)).save_pretrained(directory / "llm")
    TOWERS[tower]().save_pretrained(directory / "tower")
    llm, own = (json.loads((directory / part / "config.json").read_text()) for part in ("llm", "tower"))
    (directory / "model").mkdir()
    config = family("tinyllava").compose(llm, own) | changes
    (directory / "model" / "config.json").write_text(json.dumps(config))
    start = open_start(directory / "llm", directory / "tower", family("tinyllava"), 1, directory / "model")
    write_checkpoint(start, directory / "checkpoint", directory / "llm")


@pytest.mark.parametrize(
    ("tower", "aspect", "strategy", "tokens"),
    [
        ("siglip", "pad", "cls_patch", 4),
        ("siglip", "square", "patch", 3),
        ("clip", "pad", "patch", 4),
        ("clip", "square", "cls_patch", 5),
    ],
)
def test_stock_transformers_sees_what_training_sees(tower, aspect, strategy, tokens, tmp_path):
    checkpoint(tmp_path, tower, image_aspect_ratio=aspect, vision_feature_select_strategy=strategy)
    megatron_to_hf(tmp_path / "checkpoint", tmp_path / "out", "hf", "llama")
    info = read_info(tmp_path / "checkpoint")
    options = family("tinyllava").read(info.hf_config, info.tower_config)
    assert options.tokens_per_image == tokens

    rgb = np.random.default_rng(0).integers(0, 256, (40, 53, 3), dtype=np.uint8)
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
    reply = {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]}
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    prompt = processor.apply_chat_template([user, reply])
    inputs = processor(text=prompt, images=Image.fromarray(rgb), return_tensors="pt")
    pixels = to_pixels(rgb, image_format(options, Data(path="unused", aspect=aspect)))
    normalised = Normalise(options.image, torch.device("cpu"))(pixels[None])
    levels = (inputs["pixel_values"] - normalised).abs() * torch.tensor(options.image.std)[:, None, None] * 255
    assert levels.mean() < 0.02 and levels.max() < 1.01, "one level of 255, where two resizers round apart"

    turns = [("human", f"<image>\n{QUESTION}"), ("gpt", ANSWER)]
    ids, _ = tokenise(turns, 1, template("llama"), load_tokenizer(tmp_path / "llm"), "<image>")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    stands_for = model.config.image_token_id
    wanted = [i for k in ids.tolist() for i in ([stands_for] * tokens if k == IMAGE else [k])]
    assert inputs["input_ids"][0].tolist() == wanted
    with torch.no_grad():
        logits = model(**inputs).logits
    assert logits.shape == (1, len(wanted), 512) and logits.isfinite().all()


def test_a_model_that_transformers_cannot_hold_is_refused(tmp_path):
    checkpoint(tmp_path, "clip", connector_type="resampler", num_queries=4)
    with pytest.raises(CheckpointError, match="transformers' llava has no projector of kind 'perceiver'"):
        megatron_to_hf(tmp_path / "checkpoint", tmp_path / "out", "hf")
    assert not (tmp_path / "out").exists()
