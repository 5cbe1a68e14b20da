"""Records -> documents of an indexed dataset: what preprocessing does to each sample, in any number of processes."""

from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from megamm.data.faults import SampleFault
from megamm.data.image import verify
from megamm.data.sources import Fault, Record, read_image
from megamm.data.template import template
from megamm.data.text import tokenise
from megamm.data.tokenizer import load_tokenizer
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


@dataclass(frozen=True, slots=True)
class Document:
    """One sample as `indexed.Writer.add` takes it."""

    ids: np.ndarray
    """int32 [T]; one IMAGE per picture."""
    images: list[bytes]
    """Compressed pictures, as their files have them; each has been decoded once to see that it can be."""
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
        if not self._image_dir.is_dir():
            raise DataError(f"{recipe.image_dir}: no such directory; --image-dir is where the pictures' paths begin")

    def __call__(self, record: Record | Fault) -> Document | Fault:
        """The document of a record, or why there is none."""
        if isinstance(record, Fault):
            return record
        try:
            ids, spans = tokenise(record.turns, len(record.images), self._template, self.tokenizer, self._marker)
            images = [read_image(self._image_dir, name) for name in record.images]
            for name, image in zip(record.images, images, strict=True):
                try:
                    verify(image)
                except SampleFault as fault:
                    raise SampleFault(fault.reason, f"{name}: {fault.detail}") from fault
        except SampleFault as fault:
            return Fault(record.where, fault)
        return Document(ids, images, spans)


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
