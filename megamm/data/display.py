"""One document of a dataset for people to look at: its text in stretches, trained on or not, and a page of it."""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from megamm.batch import IMAGE
from megamm.data.image import ImageFormat, decode, to_pixels
from megamm.data.tokenizer import Tokenizer

_BROWSERS_SHOW = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp", "GIF": "image/gif"}


@dataclass(frozen=True, slots=True)
class Stretch:
    """Successive tokens of one kind."""

    kind: Literal["context", "target", "image"]
    text: str
    """Empty for a picture; without control characters, which a terminal would obey."""
    num_ids: int
    """1 for a picture."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture of a document."""

    data: bytes
    """As the dataset has it."""
    format: str
    """`JPEG`, `PNG` ..."""
    width: int
    height: int


def stretches(ids: np.ndarray, spans: np.ndarray, tokenizer: Tokenizer) -> list[Stretch]:
    """int32 ids [T] and target spans [N, 2] of a document -> its text, in order and whole."""
    kinds = np.zeros(len(ids), dtype=np.int8)
    for start, end in spans:
        kinds[start:end] = 1
    kinds[ids == IMAGE] = 2
    borders = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(ids)]
    found: list[Stretch] = []
    in_text = np.cumsum(kinds != 2)  # of the text alone, up to and with each id
    words, shown = ids[ids != IMAGE], ""
    for start, end in zip(borders, borders[1:], strict=False):
        if start == end:
            continue
        if kinds[start] == 2:
            found += [Stretch("image", "", 1)] * (end - start)
            continue
        # A tokenizer gives a text another beginning than its middle: what is new is what was added.
        text = tokenizer.decode(words[: in_text[end - 1]].tolist())
        found.append(Stretch("target" if kinds[start] else "context", _printable(text[len(shown) :]), end - start))
        shown = text
    return found


def picture(data: bytes) -> Picture:
    """A picture and its size. Raises SampleFault where it cannot be decoded."""
    height, width = decode(data).shape[:2]
    with Image.open(io.BytesIO(data)) as opened:
        return Picture(data, opened.format or "unknown", width, height)


def page(
    title: str,
    facts: Iterable[str],
    pictures: Sequence[Picture],
    text: Sequence[Stretch],
    image_format: ImageFormat | None = None,
) -> str:
    """A self-contained HTML page: pictures (with `image_format` also as the vision tower sees them), text, counts."""
    body = [f"<h1>{html.escape(title)}</h1>", f"<p>{html.escape('; '.join(facts))}</p>"]
    for number, shown in enumerate(pictures, start=1):
        caption = f"picture {number}: {shown.format} {shown.width} x {shown.height}, {len(shown.data)} bytes"
        seen = f'<img src="{_url(_as_seen(shown, image_format), "image/png")}">' if image_format else ""
        body.append(
            f'<figure><img src="{_source(shown)}">{seen}<figcaption>{html.escape(caption)}</figcaption></figure>'
        )
    spans, number = [], 0
    for stretch in text:
        content = html.escape(stretch.text)
        if stretch.kind == "image":
            number += 1
            content = f"picture {number}"
        spans.append(f'<span class="{stretch.kind}" title="{stretch.num_ids} ids">{content}</span>')
    body.append(f"<pre>{''.join(spans)}</pre>")
    body.append('<p><span class="target">target</span>, <span class="context">context</span></p>')
    return _PAGE.format(title=html.escape(title), body="\n".join(body))


def _source(shown: Picture) -> str:
    if shown.format in _BROWSERS_SHOW:
        return _url(shown.data, _BROWSERS_SHOW[shown.format])
    return _url(_png(decode(shown.data)), "image/png")


def _as_seen(shown: Picture, image_format: ImageFormat) -> bytes:
    return _png(to_pixels(decode(shown.data), image_format).permute(1, 2, 0).numpy())


def _png(rgb: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(rgb)).save(file, "PNG")
    return file.getvalue()


def _url(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid #ccc; padding: 1em }}
img {{ max-width: 45%; margin-right: 1em; vertical-align: top }}
.target {{ background: #b6e8b6 }} .context {{ color: #555 }} .image {{ background: #cfe0ff; padding: 0 0.3em }}
</style>
{body}
</html>
"""
