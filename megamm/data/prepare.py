"""Records -> documents of an indexed dataset: what preprocessing does to each sample, in any number of processes."""

from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

from megamm.data.faults import SampleFault
from megamm.data.image import picture_size, verify
from megamm.data.sources import Fault, Record, read_image
from megamm.data.template import template
from megamm.data.text import tokenise
from megamm.data.tokenizer import load_tokenizer
from megamm.data.views import ViewRules, lay_out
from megamm.errors import DataError

CHUNK = 16
"""Records that travel to a process at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How a record becomes a document; plain values, so that every process can build the same."""

    image_dir: Path
    tokenizer_dir: Path
    template: str
    marker: str
    views: ViewRules = field(default_factory=ViewRules)


@dataclass(frozen=True, slots=True)
class Document:
    """One sample as `indexed.Writer.add` takes it."""

    ids: np.ndarray
    """int32 [T]; one IMAGE per picture."""
    images: list[bytes | None]
    """Compressed pictures, as their files have them; each has been decoded once to see that it can be. None: one more
    view of the picture before."""
    spans: np.ndarray
    """int32 [N, 2]; target spans over `ids`."""


class Preparer:
    """Turns records into documents, in this process."""

    def __init__(self, recipe: Recipe):
        """Raises DataError where tokenizer or template are unknown or do not fit each other."""
        self.tokenizer = load_tokenizer(recipe.tokenizer_dir)
        self._template = template(recipe.template)
        self._template.check(self.tokenizer)
        self._image_dir = recipe.image_dir.resolve()
        self._marker = recipe.marker
        self._views = recipe.views
        if recipe.views.cut != "none" and not self._template.keeps_markers:
            raise DataError(f"--cut: template {recipe.template} has no form for tiles; use --cut none")
        if not self._image_dir.is_dir():
            raise DataError(f"{recipe.image_dir}: no such directory; --image-dir is where the pictures' paths begin")

    def __call__(self, record: Record | Fault) -> Document | Fault:
        """The document of a record, or why there is none."""
        if isinstance(record, Fault):
            return record
        try:
            if self._template.keeps_markers:
                return self._with_views(record)
            if record.videos:
                raise SampleFault("bad_record", "a video, which this template has no form for")
            ids, spans = tokenise(record.turns, len(record.images), self._template, self.tokenizer, self._marker)
            images: list[bytes | None] = [self._picture(name) for name in record.images]
            return Document(ids, images, spans)
        except SampleFault as fault:
            return Fault(record.where, fault)

    def _with_views(self, record: Record) -> Document:
        pictures = [self._picture(name) for name in record.images]
        images = [(picture, picture_size(picture)) for picture in pictures]
        videos = [self._frames(name) for name in record.videos]
        turns, views = lay_out(record.turns, images, videos, self._views, self._marker)
        ids, spans = tokenise(turns, len(views), self._template, self.tokenizer, self._marker)
        return Document(ids, views, spans)

    def _picture(self, name: str) -> bytes:
        image = read_image(self._image_dir, name)
        with _named(name):
            verify(image)
        return image

    def _frames(self, name: str) -> list[bytes]:
        from megamm.data.video import read_frames  # ffmpeg's libraries, for those who have videos

        content = read_image(self._image_dir, name)
        with _named(name):
            return read_frames(content, self._views.max_frames)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """A fault in the block says which file has it."""
    try:
        yield
    except SampleFault as fault:
        raise SampleFault(fault.reason, f"{name}: {fault.detail}") from fault


def prepare(records: Iterable[Record | Fault], recipe: Recipe, workers: int) -> Iterator[Document | Fault]:
    """Documents and faults in the order of the records, whatever the number of processes; 1 works in this one.

    Raises DataError where a process dies.
    """
    if workers <= 1:
        yield from map(Preparer(recipe), records)
        return
    stream = iter(records)
    pending: deque[Future[list[Document | Fault]]] = deque()
    with ProcessPoolExecutor(workers, initializer=_start, initargs=(recipe,)) as pool:
        try:
            while True:
                # Bounded: pictures of records far ahead must not fill the memory while a slow chunk is waited for.
                while len(pending) < 4 * workers and (chunk := list(islice(stream, CHUNK))):
                    pending.append(pool.submit(_run, chunk))
                if not pending:
                    return
                yield from pending.popleft().result()
        except BrokenProcessPool as error:
            raise DataError(f"--workers: a process died ({error}); is memory full? Try fewer") from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def count_faults(faults: Iterable[Fault]) -> dict[str, int]:
    """Number of faults by reason, the commonest first."""
    return dict(Counter(fault.fault.reason for fault in faults).most_common())


_preparer: Preparer
"""Of a worker process; set once by its initializer, because a tokenizer is too slow to load per chunk."""


def _start(recipe: Recipe) -> None:
    global _preparer
    _preparer = Preparer(recipe)


def _run(chunk: list[Record | Fault]) -> list[Document | Fault]:
    return [_preparer(record) for record in chunk]
