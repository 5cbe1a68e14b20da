"""How fast the data side is, against what it replaces: both sides in one run, taking turns, as a table and JSON.

Everything runs in one process on one thread and is measured in its CPU seconds, so that other work on the machine
disturbs little, and what comes out is per core. Only ratios mean something: medians over the rounds, with their range.

Pictures end where each side's loader does: LLaVA's at the processor's float32, ours at 8 bits, which the first stage of
the pipeline normalises on its device. What that costs on a CPU is counted in the ratios called `normalised`.
"""

import io
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
import tyro
from PIL import Image
from rich.console import Console
from rich.table import Table
from transformers import CLIPImageProcessorPil

from megamm.batch import IMAGE
from megamm.data.image import ImageFormat, verify
from megamm.data.indexed import Reader, Writer
from megamm.data.loader import Dataset
from megamm.data.parts import Parts, make_parts
from megamm.data.pool import processes
from megamm.data.prepare import Recipe
from megamm.data.sources import Source
from megamm.data.template import template
from megamm.data.tokenizer import Tokenizer, load_tokenizer
from megamm.errors import ConfigError, MegammError
from megamm.models.vision import clip
from megamm.models.vision.vit import Normalise

CLIP = ImageFormat(size=336, mean=clip.IMAGE.mean, tokens=576)
"""The tower of LLaVA-1.5."""

SIZES = ((448, 448), (640, 480), (1024, 768))
"""Width and height of the generated pictures."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measure the loader's decoding, preprocessing and the opening of an index."""

    tokenizer: Path
    """Directory of a tokenizer, for preprocessing."""
    owleval: Path | None = None
    """Folder of OwlEval with `images`; None: only generated pictures."""
    rounds: int = 7
    """Turns of each contender."""
    pictures: int = 16
    """Pictures per set and turn."""
    conversations: int = 1000
    """Conversations that are preprocessed per turn."""
    out: Path | None = None
    """Write the results as JSON to this file."""


def main(arguments: Arguments) -> None:
    """Measure, print, write. Raises MegammError."""
    if min(arguments.rounds, arguments.pictures, arguments.conversations) < 1:
        raise ConfigError(["rounds, pictures and conversations are numbers from 1 on"])
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    sets = {f"{w}x{h}": [photo(rng, w, h) for _ in range(arguments.pictures)] for w, h in SIZES}
    if arguments.owleval is not None:
        files = sorted((arguments.owleval / "images").glob("*.jpg"))
        sets["owleval"] = [file.read_bytes() for file in files[:: -(-len(files) // arguments.pictures)]]
    results: dict[str, Any] = {"cpu": torch.backends.cpu.get_cpu_capability(), "rounds": arguments.rounds}
    with tempfile.TemporaryDirectory() as folder:
        results["images"] = {
            name: images(Path(folder) / name, pictures, arguments.rounds) for name, pictures in sets.items()
        }
        tokenizer = load_tokenizer(arguments.tokenizer)
        results["preprocess"] = {
            name: preprocess(Path(folder) / name, arguments, tokenizer, pictures)
            for name, pictures in (("text", []), ("text and pictures", sets["448x448"]))
        }
        results["open_1m_ms"] = opening(Path(folder) / "index", arguments.rounds)
    show(results)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(results, indent=2) + "\n")


def photo(rng: np.random.Generator, width: int, height: int) -> bytes:
    """A JPEG with the spectrum of a photograph (amplitude falls as 1 / frequency), about half a byte a pixel."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = 1
    drawn = rng.normal(size=(4, *frequency.shape)) + 1j * rng.normal(size=(4, *frequency.shape))
    planes = np.fft.irfft2(drawn / frequency, s=(height, width))
    rgb = np.stack([planes[3] + 0.35 * plane for plane in planes[:3]], axis=-1)  # channels of a photograph are alike
    rgb = 120 + 55 * (rgb - rgb.mean()) / rgb.std()
    file = io.BytesIO()
    Image.fromarray(rgb.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
    return file.getvalue()


def take_turns(contenders: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each contender in each round, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        names = list(contenders)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start = time.process_time()
            contenders[name]()
            if number:
                seconds[name].append(time.process_time() - start)
    return seconds


def ratio(theirs: list[float], ours: list[float]) -> dict[str, float]:
    """How many times faster ours is, round by round."""
    return spread([a / b for a, b in zip(theirs, ours, strict=True)])


def spread(values: list[float]) -> dict[str, float]:
    """Median and range."""
    return {name: round(f(values), 4) for name, f in (("median", statistics.median), ("min", min), ("max", max))}


def images(folder: Path, pictures: list[bytes], rounds: int) -> dict[str, Any]:
    """Samples of one picture: stored dataset -> pixels, against LLaVA's own way from its files, and bare decoding.
    `normalised`: the same, with our pixels made the float32 that LLaVA's way ends with."""
    folder.mkdir()
    records = [{"id": k, "image": f"{k}.jpg", "conversations": []} for k in range(len(pictures))]
    (folder / "llava.json").write_text(json.dumps(records))
    with Writer(folder / "set") as writer:
        for k, picture in enumerate(pictures):
            (folder / f"{k}.jpg").write_bytes(picture)
            writer.add(np.array([1, IMAGE, 2], np.int32), [picture], np.array([[2, 3]], np.int32))
        writer.finish({"family": "llava"})
    dataset = Dataset(folder / "set", CLIP, max_tokens=2048)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    normalise = Normalise(clip.IMAGE, torch.device("cpu"))

    def ours() -> None:
        for k in range(len(pictures)):
            dataset[k]

    def normalised() -> None:
        for k in range(len(pictures)):
            normalise(dataset[k].pixels_I3HW)

    def usual() -> None:
        for record in json.loads((folder / "llava.json").read_text()):
            picture = expand2square(Image.open(folder / record["image"]).convert("RGB"), processor.image_mean)
            processor.preprocess(picture, return_tensors="pt")["pixel_values"][0]

    def bare() -> None:
        for picture in pictures:
            simplejpeg.decode_jpeg(picture, "RGB", fastdct=False, fastupsample=False)

    contenders = {"ours": ours, "normalised": normalised, "usual": usual, "bare": bare}
    seconds = take_turns(contenders, rounds)
    pixels = [simplejpeg.decode_jpeg_header(picture)[:2] for picture in pictures]
    return {
        "bytes_per_pixel": round(sum(map(len, pictures)) / sum(h * w for h, w in pixels), 3),
        "images_per_s": {name: round(len(pictures) / statistics.median(of), 1) for name, of in seconds.items()},
        "against_usual": ratio(seconds["usual"], seconds["ours"]),
        "against_bare": ratio(seconds["bare"], seconds["ours"]),
        "normalised_against_usual": ratio(seconds["usual"], seconds["normalised"]),
        "normalised_against_bare": ratio(seconds["bare"], seconds["normalised"]),
    }


def expand2square(picture: Image.Image, mean: list[float]) -> Image.Image:
    """As in LLaVA's llava/mm_utils.py."""
    width, height = picture.size
    if width == height:
        return picture
    side = max(width, height)
    square = Image.new("RGB", (side, side), tuple(int(255 * value) for value in mean))
    square.paste(picture, ((side - width) // 2, (side - height) // 2))
    return square


def preprocess(folder: Path, arguments: Arguments, tokenizer: Tokenizer, pictures: list[bytes]) -> dict[str, Any]:
    """Conversations like LLaVA's -> dataset, against copying the files and against the tokenizer alone. `checked`: the
    tokenizer, and what sees that each picture can be decoded: the least that has to be done. `unchecked`: ours, where
    check.py has seen it before."""
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(1)
    words = ["the", "a", "cat", "dog", "sits", "on", "under", "of", "picture", "what", "is", "red", "near", "in"]
    turns = [" ".join(rng.choice(words, size)) for size in rng.integers(5, 80, 6 * arguments.conversations)]
    records = []
    for k in range(arguments.conversations):
        values = turns[6 * k : 6 * k + 6]
        record: dict[str, Any] = {"id": str(k)}
        if pictures:
            record["image"] = f"{k}.jpg"
            (folder / "images" / f"{k}.jpg").write_bytes(pictures[k % len(pictures)])
            values[0] = f"<image>\n{values[0]}"
        speakers = ("human", "gpt") * 3
        record["conversations"] = [{"from": a, "value": b} for a, b in zip(speakers, values, strict=True)]
        records.append(record)
    source = folder / "llava.json"
    source.write_text(json.dumps(records))
    form = template("vicuna_v1")
    said = [[turn["value"] for turn in record["conversations"]] for record in records]
    texts = [form.render(list(zip(texts[::2], texts[1::2], strict=True)), "<image>")[0] for texts in said]
    recipe = Recipe(
        image_dir=folder / "images", tokenizer_dir=arguments.tokenizer, template="vicuna_v1", marker="<image>"
    )

    def ours(recipe: Recipe = recipe) -> None:
        shutil.rmtree(folder / "out", ignore_errors=True)
        with processes(1, False) as pool, Parts(folder / "out" / "set", {"run": "benchmark"}) as parts:
            assert pool is not None
            make_parts(parts, Source([source]), recipe, pool, lambda *_: None)
            parts.finish({"family": "llava"})

    def copy() -> None:
        shutil.rmtree(folder / "copy", ignore_errors=True)
        shutil.copytree(folder / "images", folder / "copy")
        shutil.copy(source, folder / "copy")

    def bare() -> None:
        for text in texts:
            tokenizer.encode(text, bos=True)

    def checked() -> None:
        bare()
        for file in (folder / "images").iterdir():
            verify(file.read_bytes())

    contenders: dict[str, Callable[[], None]] = {"ours": ours, "copy": copy, "tokenizer": bare, "checked": checked}
    if pictures:
        contenders["unchecked"] = partial(ours, replace(recipe, has_sound_pictures=True))
    seconds = take_turns(contenders, arguments.rounds)
    assert len(Reader(folder / "out" / "set")) == len(records)
    slower = [max(pair) for pair in zip(seconds["copy"], seconds["tokenizer"], strict=True)]
    return {
        "samples_per_s": {name: round(len(records) / statistics.median(of), 1) for name, of in seconds.items()},
        "against_slower": ratio(slower, seconds["ours"]),
        "against_checked": ratio(seconds["checked"], seconds["ours"]),
        **({"unchecked_against_slower": ratio(slower, seconds["unchecked"])} if pictures else {}),
    }


def opening(prefix: Path, rounds: int) -> dict[str, float]:
    """Milliseconds, by the clock, to open an index of a million samples of one picture; its .bin is a hole."""
    num = 1_000_000
    with Writer(prefix) as writer:
        writer.add(np.array([1, IMAGE, 2], np.int32), [b"1234"], np.array([[2, 3]], np.int32))
        info = writer.finish({})
    idx, one = prefix.with_suffix(".idx"), prefix.with_suffix(".idx").read_bytes()[:18]
    lengths = np.tile(np.array([3, 2, 2], "<i4"), num)
    sizes = lengths.astype("<i8") * 4
    starts, modes = np.arange(0, 3 * num + 1, 3, dtype="<i8"), np.tile(np.array([0, 1, 2], "i1"), num)
    counts = np.array([len(lengths), len(starts)], "<u8")
    idx.write_bytes(one + b"".join(a.tobytes() for a in (counts, lengths, np.cumsum(sizes) - sizes, starts, modes)))
    with prefix.with_suffix(".bin").open("r+b") as file:
        file.truncate(int(sizes.sum()))
    sizes_now = {"documents": num, "bin_bytes": int(sizes.sum()), "idx_bytes": idx.stat().st_size}
    prefix.with_suffix(".json").write_text(json.dumps(info | sizes_now))
    seconds = []
    for _ in range(3 * rounds):
        start = time.perf_counter()
        Reader(prefix)
        seconds.append(1e3 * (time.perf_counter() - start))
    return spread(seconds)


def show(results: dict[str, Any]) -> None:
    """Print the ratios."""
    table = Table("what", "ours per second", "against", "median", "range")

    def row(name: str, rate: float, against: str, found: dict[str, float]) -> None:
        table.add_row(
            name, f"{rate:.0f}", against, f"{found['median']:.2f}", f"{found['min']:.2f} to {found['max']:.2f}"
        )

    for name, found in results["images"].items():
        rates = found["images_per_s"]
        row(f"pictures {name}", rates["ours"], "LLaVA's way", found["against_usual"])
        row("", rates["ours"], "bare decoding", found["against_bare"])
        row("normalised", rates["normalised"], "LLaVA's way", found["normalised_against_usual"])
        row("", rates["normalised"], "bare decoding", found["normalised_against_bare"])
    for name, found in results["preprocess"].items():
        rate = found["samples_per_s"]["ours"]
        row(f"preprocess {name}", rate, "slower of copy, tokenizer", found["against_slower"])
        row("", rate, "tokenizer, pictures checked", found["against_checked"])
        if "unchecked_against_slower" in found:
            rate = found["samples_per_s"]["unchecked"]
            row("pictures checked before", rate, "slower of copy, tokenizer", found["unchecked_against_slower"])
    console = Console()
    console.print(table)
    opened = results["open_1m_ms"]
    console.print(f"opening 1,000,000 samples: {opened['median']:.0f} ms ({opened['min']:.0f} to {opened['max']:.0f})")


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments))
    except MegammError as error:
        sys.exit(f"error: {error}")
