"""Show one sample of a preprocessed dataset as it will be trained on.

python data_tools/show.py PREFIX --tokenizer DIR [--sample 17] [--html sample.html]
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.text import Text

from megamm.data.blend import open_reader
from megamm.data.display import Stretch, page, picture, stretches
from megamm.data.image import ImageFormat
from megamm.data.indexed import writing
from megamm.data.tokenizer import load_tokenizer
from megamm.errors import DataError, MegammError

STYLES = {"context": "dim", "target": "bold black on green", "image": "black on bright_blue"}


@dataclass(kw_only=True, slots=True)
class Options:
    """Show a sample's pictures, its text with what is trained on in colour, and its tokens."""

    prefix: Annotated[str, tyro.conf.Positional]
    """Prefix of the dataset, as preprocess.py wrote it, or of a blend."""
    tokenizer: Path
    """Directory of the tokenizer it was made with."""
    sample: int = 0
    """Number of the sample, from 0."""
    model: Path | None = None
    """Directory with the model's config.json; for the tokens of a picture, and pictures as the tower sees them."""
    html: Path | None = None
    """File to write a page to, with the pictures in it."""


def main(options: Options) -> None:
    """Show the sample on standard output. Raises MegammError where dataset and tokenizer do not fit each other."""
    reader, tokenizer = open_reader(options.prefix), load_tokenizer(options.tokenizer)
    made_with = reader.info.get("tokenizer", {}).get("hash")
    if made_with not in (None, tokenizer.hash):
        raise DataError(
            f"{options.tokenizer}: another tokenizer ({tokenizer.hash:.12}) than that of {options.prefix} "
            f"({made_with:.12}): its ids mean something else; give the one it was made with"
        )
    if not 0 <= options.sample < len(reader):
        raise DataError(f"--sample: {options.sample}; {options.prefix} has samples 0 to {len(reader) - 1}")
    ids, spans = reader.text(options.sample)
    pictures = [picture(reader.image(options.sample, k)) for k, _ in reader.views(options.sample)]
    text = stretches(ids, spans, tokenizer)
    image_format = _image_format(options.model, reader.info["family"]) if options.model else None
    title = f"{options.prefix}: sample {options.sample} of {len(reader)}"
    facts = _facts(text, len(pictures), image_format, reader.info.get("placeholder"))
    console = Console(highlight=False)
    console.print(title, *facts, sep="\n", markup=False, soft_wrap=True)
    for number, shown in enumerate(pictures, start=1):
        console.print(f"picture {number}: {shown.format} {shown.width} x {shown.height}, {len(shown.data)} bytes")
    console.print(_coloured(text))
    if options.html:
        with writing(options.html):
            aside = options.html.with_name(options.html.name + ".tmp")
            aside.write_text(page(title, facts, pictures, text, image_format), encoding="utf-8")
            os.replace(aside, options.html)


def _facts(
    text: list[Stretch], num_pictures: int, image_format: ImageFormat | None, placeholder: list[int] | None
) -> list[str]:
    tokens = sum(stretch.num_ids for stretch in text if stretch.kind != "image")
    targets = sum(stretch.num_ids for stretch in text if stretch.kind == "target")
    views = sum(stretch.kind == "image" for stretch in text)
    facts = [f"{tokens} text tokens, {targets} of them targets", f"{num_pictures} pictures"]
    if views != num_pictures:
        facts.append(f"{views} views of them")
    if placeholder is not None:
        total = tokens + views * len(placeholder)
        facts.append(f"{len(placeholder)} tokens stand for a view, {total} tokens in all; image tokens lie beside them")
    elif image_format:
        image_tokens = views * image_format.tokens
        facts.append(f"{image_tokens} image tokens, {tokens + image_tokens} tokens in all")
    return facts


def _coloured(text: list[Stretch]) -> Text:
    shown, number = Text(), 0
    for stretch in text:
        number += stretch.kind == "image"
        shown.append(stretch.text or f"[picture {number}]", style=STYLES[stretch.kind])
    return shown


def _image_format(directory: Path, name: str) -> ImageFormat:
    from megamm.config import Data  # these import megatron, which nothing else here needs
    from megamm.registry import family
    from megamm.training.setup import image_format
    from megamm.weights.hf import read_json

    options = family(name).read(read_json(directory / "config.json"), None)
    return image_format(options, Data(path=""))


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except MegammError as error:
        sys.exit(f"error: {error}")
