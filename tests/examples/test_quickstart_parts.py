"""The parts of the quickstart that need no training run: data, model, prompt, captions, report, command lines."""

import json
import os
import random
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from examples.quickstart import caption, draw, make_model, report, run
from megamm import registry
from megamm.batch import IGNORE, IMAGE
from megamm.config.check import find_problems
from megamm.config.load import load_recipe
from megamm.data.template import template
from megamm.data.text import expand, tokenise
from megamm.data.tokenizer import load_tokenizer
from megamm.testing.tiny import tiny_llava, tiny_tokenizer
from megamm.weights.convert import open_hf

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small picture set: 60 to train on, 12 held out."""
    output = tmp_path_factory.mktemp("quickstart") / "data"
    draw.draw(output, num_train=60, num_heldout=12, seed=0)
    return output


@pytest.fixture(scope="module")
def model(data: Path) -> Path:
    """The quickstart's random model, its tokenizer trained on the small set."""
    output = data.parent / "hf"
    tiny_llava(output, texts=make_model.texts(data / "train.json"), seed=0)
    return output


def test_what_is_never_trained_on_is_known_in_other_company() -> None:
    seen = [thing for thing in draw.THINGS if thing not in draw.UNSEEN]
    assert len({draw.caption(thing) for thing in draw.THINGS}) == len(draw.THINGS) >= 60
    assert len(draw.UNSEEN) >= 10
    for words in zip(*seen, strict=True):
        assert set(words) in ({*draw.COLOURS}, {*draw.SHAPES}, {*draw.PLACES})


def test_the_sets_are_as_described(data: Path) -> None:
    train, heldout = (json.loads((data / f"{name}.json").read_text()) for name in ("train", "heldout"))
    unseen = {draw.caption(thing) for thing in draw.UNSEEN}
    assert (len(train), len(heldout)) == (60, 12)
    assert not unseen & {sample["conversations"][1]["value"] for sample in train}
    assert [sample["conversations"][1]["value"] in unseen for sample in heldout] == 3 * [True] + 9 * [False]
    assert [sample["unseen"] for sample in heldout] == 3 * [True] + 9 * [False]
    files = [data / "images" / sample["image"] for sample in train + heldout]
    assert len({file.read_bytes() for file in files}) == 72


def test_a_seed_draws_the_same_again_and_an_output_is_never_overwritten(data: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    draw.draw(again, num_train=60, num_heldout=12, seed=0)
    for file in ("train.json", "heldout.json", "images/train-00059.jpg", "images/heldout-00000.jpg"):
        assert (again / file).read_bytes() == (data / file).read_bytes()
    with pytest.raises(SystemExit, match="exists already; remove it"):
        draw.draw(again, num_train=1, num_heldout=4, seed=1)


@pytest.mark.parametrize("place", draw.PLACES)
def test_a_thing_is_where_its_caption_says(place: str) -> None:
    pixels = np.asarray(draw.picture(("black", "square", place), random.Random(0)))
    rows, columns = np.nonzero(pixels.max(axis=2) < 80)
    row, column = divmod(draw.PLACES.index(place), 3)
    cell = draw.SIZE / 3
    assert row * cell < rows.mean() < (row + 1) * cell
    assert column * cell < columns.mean() < (column + 1) * cell


def test_stock_transformers_prompts_with_the_ids_of_training(data: Path, model: Path) -> None:
    sample = json.loads((data / "train.json").read_text())[0]
    turns = [(turn["from"], turn["value"]) for turn in sample["conversations"]]
    ids, spans = tokenise(turns, 1, template("v1"), load_tokenizer(model), "<image>")
    expanded, labels, _ = expand(ids, spans, tokens_per_image=9, max_tokens=128)
    prompt_ids = expanded[: int(np.argmax(labels != IGNORE))]

    processor = AutoProcessor.from_pretrained(model)
    image_id = AutoConfig.from_pretrained(model).image_token_index
    content = [{"type": "image"}, {"type": "text", "text": draw.QUESTION}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    picture = Image.open(data / "images" / sample["image"])
    inputs = processor(text=prompt, images=picture, return_tensors="np")
    np.testing.assert_array_equal(inputs["input_ids"][0], np.where(prompt_ids == IMAGE, image_id, prompt_ids))
    assert inputs["pixel_values"].shape == (1, 3, 48, 48)

    said = sample["conversations"][1]["value"]
    answer = expanded[labels != IGNORE].tolist()
    assert processor.tokenizer.decode(answer).strip() == f"{said}</s>"
    assert len(answer) == len(said.split()) + 1, "every word of a caption is one token"


def test_a_tokenizer_alone_keeps_its_ids_and_falls_back_to_bytes(tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path / "tokenizer", ["one two three four five six"] * 4, vocab_size=300)
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.adds_bos) == (1, 2, True)
    assert tokenizer.vocab_size <= 300
    assert tokenizer.pad_id == tokenizer.vocab_size - 1
    assert tokenizer.encode("<image>", bos=False) == [tokenizer.vocab_size - 2]
    assert tokenizer.decode(tokenizer.encode("three ö", bos=False)).strip() == "three ö"
    # Behind a marker, a text begins with a space of its own, as when it stands alone.
    marker, pad = tokenizer.vocab_size - 2, tokenizer.encode("\ntwo", bos=False)
    assert tokenizer.encode("one<image>\ntwo", bos=False) == [*tokenizer.encode("one", bos=False), marker, *pad]


def test_the_model_has_the_sizes_asked_for_and_is_one_that_megamm_imports(tmp_path: Path) -> None:
    sizes = dict(image_size=28, patch_size=14, vision_width=32, vision_mlp=48, vision_layers=4, vision_heads=2)
    sizes |= dict(width=48, mlp=64, layers=3, heads=4, kv_heads=4, vocab_size=320, max_positions=64)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        tiny_llava(tmp_path / name, texts=["a red circle"], seed=seed, **sizes)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]

    opened = open_hf(tmp_path / "a", None, list(registry.FAMILIES.values()))
    assert opened.family.name == "llava"
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "a")
    assert loaded.config.image_seq_length == 4
    assert loaded.lm_head.weight.shape == (320, 48)
    assert loaded.lm_head.weight.std().item() == pytest.approx(48**-0.5, rel=0.05)
    assert [len(loaded.model.vision_tower.encoder.layers), len(loaded.model.language_model.layers)] == [4, 3]


def test_captions_do_not_depend_on_the_batch(data: Path, model: Path) -> None:
    images = sorted((data / "images").glob("heldout-*.jpg"))[:5]
    torch.manual_seed(0)
    together = caption.captions(model, images, draw.QUESTION, batch_size=5)
    assert together == caption.captions(model, images, draw.QUESTION, batch_size=2)
    assert len(together) == 5


def test_captions_are_counted_and_reported(data: Path, tmp_path: Path) -> None:
    samples = json.loads((data / "heldout.json").read_text())
    said = [sample["conversations"][1]["value"] for sample in samples]
    said[0] += " and more"  # of an unseen thing
    entries = caption.results(samples, said, data / "images")
    assert caption.summary(entries).splitlines() == [
        "wholly right, all: 11 of 12 (91.7%)",
        "wholly right, things trained on: 9 of 9 (100.0%)",
        "wholly right, things never trained on: 2 of 3 (66.7%)",
    ]
    (tmp_path / "captions.json").write_text(json.dumps(entries))
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps({"step": step, "loss": 1 / step, "lr": 1e-3}) + "\n" for step in range(1, 9)))
    report.report(log, tmp_path / "captions.json", tmp_path / "report.png")
    with Image.open(tmp_path / "report.png") as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 500
    assert not list(tmp_path.glob("*.partial*"))


def test_the_report_shows_wrong_captions_but_not_only_those() -> None:
    results = [{"right": i % 2 == 0, "unseen": i % 4 < 2, "i": i} for i in range(40)]
    shown = report.chosen(results, 12)
    assert [sum(not result["right"] for result in shown), len(shown), len({result["i"] for result in shown})] == [
        4,
        12,
        12,
    ]


def test_the_recipe_fits_four_ranks() -> None:
    config = load_recipe(ROOT / "examples" / "quickstart" / "recipe.py")
    assert not find_problems(config, world_size=4)
    assert (config.parallel.tp, config.parallel.pp, config.train.precision) == (2, 2, "fp32")


def test_every_command_starts_a_script_that_exists(tmp_path: Path) -> None:
    lines = run.commands("runs/quickstart", "llava")
    for line in lines:
        scripts = [word for word in shlex.split(line) if word.endswith(".py")]
        assert scripts and all((ROOT / script).is_file() for script in scripts), line
    readme = (ROOT / "examples" / "quickstart" / "README.md").read_text()
    shown = readme.replace("\\\n", " ").split()
    for line in lines:
        missing = [word for word in line.split() if word not in shown and "STEP" not in word]
        assert not missing, f"{missing} of `{line}` is not in the README"
    for step in ("step_00000009", "step_00000010"):
        (tmp_path / "train" / step).mkdir(parents=True)
    assert run.newest("a train/STEP b", tmp_path) == "a train/step_00000010 b"


@pytest.mark.parametrize(
    "words",
    [
        ["quickstart/make_model.py", "--data", "absent"],
        ["quickstart/caption.py", "--model", "absent"],
        ["quickstart/report.py", "--log", "absent"],
        ["imp/add_end_token.py", "absent", "output"],
    ],
)
def test_a_wrong_path_is_one_message(words: list[str], tmp_path: Path) -> None:
    environment = dict(os.environ) | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "examples" / words[0], *words[1:]]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert done.stderr.count("error: ") == 1 and "absent" in done.stderr
    assert not any(tmp_path.iterdir())
