"""What stands around a native export: stock transformers prompts, prepares pictures and answers as megamm does."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from megamm.batch import IMAGE
from megamm.config.schema import Data
from megamm.data.image import to_pixels
from megamm.data.template import template
from megamm.data.text import expand, tokenise
from megamm.data.tokenizer import load_tokenizer
from megamm.errors import CheckpointError
from megamm.models.vision.vit import Normalise
from megamm.registry import family
from megamm.release import export
from megamm.testing.tiny import tiny_byte_tokenizer
from megamm.training.setup import image_format
from megamm.weights.convert import import_hf, open_start, write_checkpoint

SIZES = dict(num_attention_heads=4, num_hidden_layers=2, hidden_size=32, intermediate_size=64)
QWEN = ("<|im_start|>", "<|im_end|>")
PHI3 = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
CASES = {
    # family, llm, vocabulary, special tokens, template: the last has no row left for the image.
    "imp on qwen1.5": ("imp", "qwen2", 300, QWEN, "qwen2", "square"),
    "imp on phi-3": ("imp", "phi3", 300, PHI3, "phi3", "pad"),
    "llava, a full vocabulary": ("llava", "llama", 258, ("</s>",), None, "square"),
}


@pytest.fixture(params=CASES)
def started(request, tmp_path):
    """A checkpoint of a tiny llm with its tokenizer and a tiny tower, and what it is."""
    name, model_type, vocab, special, form, aspect = CASES[request.param]
    torch.manual_seed(0)
    tiny_byte_tokenizer(tmp_path / "llm", *special)
    config = AutoConfig.for_model(
        model_type, vocab_size=vocab, num_key_value_heads=2, pad_token_id=0, max_position_embeddings=512, **SIZES
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "llm")
    tower_class, config_class = (
        (SiglipVisionModel, SiglipVisionConfig) if name == "imp" else (CLIPVisionModel, CLIPVisionConfig)
    )
    tower_class(config_class(image_size=28, patch_size=7, **SIZES)).save_pretrained(tmp_path / "tower")
    checkpoint = open_start(tmp_path / "llm", tmp_path / "tower", family(name), seed=1)
    write_checkpoint(checkpoint, tmp_path / "checkpoint", tmp_path / "llm")
    return tmp_path, checkpoint, vocab, form or family(name).template, aspect


def test_stock_transformers_sees_what_training_saw(started):
    folder, checkpoint, vocab, form, aspect = started
    assert export(folder / "checkpoint", folder / "out", "hf", form) == "hf"
    processor = AutoProcessor.from_pretrained(folder / "out")
    model = AutoModelForImageTextToText.from_pretrained(folder / "out").eval()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 45, 3), dtype=np.uint8))
    question, answer = "What is it?", "a picture"
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
    text = processor.apply_chat_template(messages)
    found = processor(images=picture, text=text, return_tensors="pt")

    options = checkpoint.options
    tokenizer = load_tokenizer(folder / "llm")
    turns = [("human", f"<image>\n{question}"), ("gpt", answer)]
    ids, spans = tokenise(turns, 1, template(form), tokenizer, "<image>")
    ids, _, _ = expand(ids, spans, options.tokens_per_image, 512)
    image_id = json.loads((folder / "out/config.json").read_text())["image_token_index"]
    assert found.input_ids[0].tolist() == np.where(ids == IMAGE, image_id, ids).tolist()
    pixels = to_pixels(np.asarray(picture), image_format(options, Data(path="unused", aspect=aspect)))
    normalised = Normalise(options.image, torch.device("cpu"))(pixels[None])
    difference = (found.pixel_values - normalised).abs() * torch.tensor(options.image.std)[:, None, None]
    assert difference.mean() < 0.02 / 255
    assert image_id == tokenizer.vocab_size and model.get_input_embeddings().num_embeddings == max(vocab, image_id + 1)
    with torch.no_grad():
        logits = model(**found).logits
    assert torch.isfinite(logits).all() and (vocab > image_id or logits.argmax(-1).max() < vocab)


def test_the_export_of_an_imported_export_is_the_same(started):
    folder, checkpoint, _, form, _ = started
    export(folder / "checkpoint", folder / "out", "hf", form)
    import_hf(folder / "out", None, [checkpoint.family], folder / "again")
    assert export(folder / "again", folder / "back") == "hf"
    first, second = (sorted(path.name for path in (folder / name).iterdir()) for name in ("out", "back"))
    assert first == second
    for name in first:
        assert (folder / "out" / name).read_bytes() == (folder / "back" / name).read_bytes(), name


def test_phi2_is_refused_and_nothing_is_written(tmp_path):
    tiny_byte_tokenizer(tmp_path / "llm", "</s>")
    config = AutoConfig.for_model("phi", vocab_size=300, partial_rotary_factor=0.5, hidden_act="gelu_new", **SIZES)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "llm")
    SiglipVisionModel(SiglipVisionConfig(image_size=28, patch_size=7, **SIZES)).save_pretrained(tmp_path / "tower")
    checkpoint = open_start(tmp_path / "llm", tmp_path / "tower", family("imp"), seed=1)
    write_checkpoint(checkpoint, tmp_path / "checkpoint", tmp_path / "llm")
    with pytest.raises(CheckpointError, match="bias on the head"):
        export(tmp_path / "checkpoint", tmp_path / "out", "hf")
    assert not (tmp_path / "out").exists()
    assert export(tmp_path / "checkpoint", tmp_path / "out") == "original"
