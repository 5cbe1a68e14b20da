"""Everything that is wrong with a source, in one pass: what preprocessing would skip, and what would end it."""

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from megamm.data.faults import REMEDIES, Fault
from megamm.data.pool import Pool, in_order
from megamm.data.prepare import Recipe, preparer
from megamm.data.sources import Piece, Record, Source, read_piece
from megamm.errors import DataError


@dataclass(frozen=True, slots=True)
class Bad:
    """One sample, or a whole file, that cannot be used."""

    where: str
    """Such as `llava.json item 17`, or the path of a file."""
    reason: str
    """A key of faults.REASONS, or `bad_file`."""
    message: str
    remedy: str

    def as_dict(self) -> dict[str, str]:
        """For JSON."""
        return asdict(self)


@dataclass(slots=True)
class Audit:
    """Counts over a source; whole when `audit` has ended."""

    num_samples: int = 0
    num_images: int = 0
    """Pictures of the samples that can be used."""
    bad: Counter[str] = field(default_factory=Counter)
    """Samples and files that cannot be used, by reason."""
    num_duplicate_ids: int = 0
    """Samples whose id another one before it has. No fault: ids name nothing here, and LLaVA's own mix repeats them."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def audit(
    source: Source, recipe: Recipe, pool: Pool, found: Audit, advance: Callable[[int, int], None]
) -> Iterator[Bad]:
    """What is bad, in the order of the source. Counts go to `found`, 8 bytes a sample are held until the end.

    `advance` is told the bytes of the source and the samples that have been done since.
    """
    ids = array("q")
    for task, future in in_order(pool, _look_at, _tasks(source, recipe)):
        looked = future.result()
        found.num_samples += looked.num_samples
        found.num_images += looked.num_images
        found.bad.update(bad.reason for bad in looked.bad)
        ids.extend(looked.ids)
        yield from looked.bad
        advance(task.piece.size if isinstance(task.piece, Piece) else 0, looked.num_samples)
    found.num_duplicate_ids = len(ids) - len(np.unique(np.frombuffer(ids, np.int64))) if ids else 0


@dataclass(slots=True)
class _Looked:
    num_samples: int = 0
    num_images: int = 0
    bad: list[Bad] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Task:
    path: Path
    form: str
    piece: Piece | DataError
    """Or why there is no further one in the file."""
    recipe: Recipe


def _tasks(source: Source, recipe: Recipe) -> Iterator[_Task]:
    for path, form in source.files:
        try:
            for piece in source.pieces_of(path, form):
                yield _Task(path, form, piece, recipe)
        except DataError as error:
            yield _Task(path, form, error, recipe)


def _look_at(task: _Task) -> _Looked:
    looked, prepare = _Looked(), preparer(task.recipe)
    try:
        if isinstance(task.piece, DataError):
            raise task.piece
        for record in read_piece(task.form, task.piece):
            looked.num_samples += 1
            if isinstance(record, Record) and record.id:
                digest = hashlib.blake2b(record.id.encode(errors="surrogatepass"), digest_size=8).digest()
                looked.ids.append(int.from_bytes(digest, "little", signed=True))
            result = prepare(record)
            if isinstance(result, Fault):
                reason = result.fault.reason
                looked.bad.append(Bad(result.where, reason, str(result.fault), REMEDIES[reason]))
            else:
                looked.num_images += sum(image is not None for image in result.images)
    except DataError as error:
        looked.bad.append(_bad_file(str(task.path), error))
    return looked


def _bad_file(path: str, error: DataError) -> Bad:
    message, _, remedy = str(error).removeprefix(f"{path}: ").rpartition("; ")
    return Bad(path, "bad_file", message or str(error), remedy or "fetch the file again")
