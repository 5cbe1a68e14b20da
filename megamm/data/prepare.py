"""Records -> documents of an indexed dataset: what preprocessing does to each sample."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np

from megamm.data.faults import Fault, SampleFault
from megamm.data.image import picture_size, reencode, verify, verify_header
from megamm.data.prompts import check_style, with_prompt
from megamm.data.sources.files import VIDEO_BYTES, read_image
from megamm.data.sources.record import MARKER, Media, Record
from megamm.data.template import template
from megamm.data.text import Turn, tokenise
from megamm.data.tokenizer import load_tokenizer
from megamm.data.views import ViewRules, lay_out
from megamm.errors import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How a record becomes a document; plain values, so that every process can build the same."""

    image_dir: Path
    tokenizer_dir: Path
    template: str
    marker: str
    """The model's; in sources a picture is `<image>`, or spelt like this."""
    views: ViewRules = field(default_factory=ViewRules)
    prompt_style: str = "none"
    """One of prompts.STYLES."""
    max_side: int | None = None
    """Pixels; larger pictures are scaled down. None: pictures keep their bytes."""
    quality: int | None = None
    """1 to 100; every picture becomes a JPEG of it. None: pictures keep their bytes."""
    has_sound_pictures: bool = False
    """Whether somebody has decoded them all before: then only their headers are read."""


@dataclass(frozen=True, slots=True)
class Document:
    """One sample as `indexed.Writer.add` takes it."""

    ids: np.ndarray
    """int32 [T]; one IMAGE per picture."""
    images: list[bytes | None]
    """Compressed pictures, as their files have them unless the recipe re-encodes them; each has been decoded once to
    see that it can be, if the recipe does not say that somebody has. None: one more view of the picture before."""
    spans: np.ndarray
    """int32 [N, 2]; target spans over `ids`."""


class Preparer:
    """Turns records into documents, in this process."""

    def __init__(self, recipe: Recipe):
        """Raises DataError where tokenizer or template are unknown or do not fit each other."""
        self.tokenizer = load_tokenizer(recipe.tokenizer_dir)
        self._template = template(recipe.template)
        self._template.check(self.tokenizer)
        check_style(recipe.prompt_style)
        self._image_dir = recipe.image_dir.resolve()
        self._recipe = recipe
        if recipe.views.cut != "none" and not self._template.keeps_markers:
            raise DataError(f"--cut: template {recipe.template} has no form for tiles; use --cut none")
        if not self._image_dir.is_dir():
            raise DataError(f"{recipe.image_dir}: no such directory; --image-dir is where the pictures' paths begin")

    def __call__(self, record: Record | Fault) -> Document | Fault:
        """The document of a record, or why there is none."""
        if isinstance(record, Fault):
            return record
        marker = self._recipe.marker
        try:
            turns = [(role, text.replace(MARKER, marker)) for role, text in record.turns]
            turns = with_prompt(turns, self._recipe.prompt_style)
            if self._template.keeps_markers:
                return self._with_views(turns, record)
            if record.videos:
                raise SampleFault("video", f"{len(record.videos)} of them")
            ids, spans = tokenise(turns, len(record.images), self._template, self.tokenizer, marker)
            return Document(ids, list(self._pictures(record)), spans)
        except SampleFault as fault:
            return Fault(record.where, fault)

    def _with_views(self, turns: list[Turn], record: Record) -> Document:
        recipe = self._recipe
        images = [(picture, picture_size(picture)) for picture in self._pictures(record)]
        videos = [self._frames(video, f"video {i}") for i, video in enumerate(record.videos, start=1)]
        turns, views = lay_out(turns, images, videos, recipe.views, recipe.marker)
        ids, spans = tokenise(turns, len(views), self._template, self.tokenizer, recipe.marker)
        return Document(ids, views, spans)

    def _pictures(self, record: Record) -> list[bytes]:
        return [self._picture(image, f"picture {i}") for i, image in enumerate(record.images, start=1)]

    def _picture(self, image: Media, name: str) -> bytes:
        if isinstance(image, str):
            name, image = image, read_image(self._image_dir, image)
        try:
            (verify_header if self._recipe.has_sound_pictures else verify)(image)
            return reencode(image, self._recipe.max_side, self._recipe.quality)
        except SampleFault as fault:
            raise SampleFault(fault.reason, f"{name}: {fault.detail}") from fault

    def _frames(self, video: Media, name: str) -> list[bytes]:
        from megamm.data.video import read_frames  # ffmpeg's libraries, for those who have videos

        if isinstance(video, str):
            name, video = video, read_image(self._image_dir, video, VIDEO_BYTES)
        try:
            return read_frames(video, self._recipe.views.max_frames)
        except SampleFault as fault:
            raise SampleFault(fault.reason, f"{name}: {fault.detail}") from fault


@lru_cache(maxsize=1)
def preparer(recipe: Recipe) -> Preparer:
    """The Preparer of a recipe, made once per process: a tokenizer is too slow to load per piece."""
    return Preparer(recipe)


def count_faults(faults: Iterable[Fault]) -> dict[str, int]:
    """Number of faults by reason, the commonest first."""
    return dict(Counter(fault.fault.reason for fault in faults).most_common())
