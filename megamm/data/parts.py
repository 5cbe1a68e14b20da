"""What preprocessing leaves on its way: PREFIX.parts, with a finished part per piece of the source, merged in order.

A part is NNNNNN.bin and, put in place after it, NNNNNN.json. Merging appends the .bin to `merged.bin` and deletes it,
so that the disk holds everything once; the .json stays and says so. Whatever moment a run dies at, what is there tells
the next one where to go on. The directory is gone when the dataset is whole.
"""

import fcntl
import json
import os
import re
import shutil
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megamm.data.faults import REASONS, Fault, SampleFault
from megamm.data.indexed import Index, paths_of, put_in_place, writing
from megamm.data.pool import Pool, in_order
from megamm.data.prepare import Document, Recipe, preparer
from megamm.data.sources import Piece, Source, read_piece
from megamm.errors import DataError

LAYOUT_VERSION = 1
"""Of the directory; a run refuses the leftovers of another."""

PATIENCE_S = 2.0
"""The processes of a run that was killed share its lock, and end a moment after it."""

AT_ONCE = 16
"""Records that are parsed before the first of them is tokenised: in turns, the two push each other out of the
processor's caches."""

_RUN, _MERGED = "run.json", "merged.bin"
_OURS = re.compile(r"run\.json|merged\.\w+|\d{6,}\.(bin|json)|.*\.tmp")


@dataclass(frozen=True, slots=True)
class _Task:
    number: int
    form: str
    piece: Piece
    recipe: Recipe
    directory: Path
    is_done: bool


def make_parts(parts: "Parts", source: Source, recipe: Recipe, pool: Pool, advance: Callable[[int, int], None]) -> None:
    """Make every part that is not there yet, in any number of processes, and merge each in its turn.

    `advance` is told the bytes of the source and the samples that have been done since.
    """
    tasks = (
        _Task(number, form, piece, recipe, parts.directory, parts.is_done(number))
        for number, form, piece in source.pieces()
    )
    for task, future in in_order(pool, _make, tasks):
        future.result()
        advance(task.piece.size, parts.merge() if task.number >= parts.merged else 0)


def _make(task: _Task) -> None:
    if not task.is_done:
        prepare = preparer(task.recipe)
        records = read_piece(task.form, task.piece)
        batches = iter(lambda: list(islice(records, AT_ONCE)), [])
        results = (prepare(record) for batch in batches for record in batch)
        write_part(task.directory, task.number, results)


def write_part(directory: Path, number: int, results: Iterable[Document | Fault]) -> None:
    """Write one part, in any process. Raises DataError where it cannot be written."""
    index, faults = Index(), []
    unique = f"{number:06d}.{socket.gethostname()}.{os.getpid()}"  # a dying run's process may still be at the same part
    asides = directory / f"{unique}.bin.tmp", directory / f"{unique}.json.tmp"
    try:
        with writing(directory):
            with asides[0].open("wb") as file:
                for result in results:
                    if isinstance(result, Fault):
                        faults.append((result.where, result.fault.reason, result.fault.detail))
                    else:
                        for content in index.add(result.ids, result.images, result.spans):
                            file.write(content)
            asides[1].write_text(json.dumps({"index": index.as_dict(), "faults": faults}), encoding="utf-8")
            os.replace(asides[0], directory / f"{number:06d}.bin")
            os.replace(asides[1], directory / f"{number:06d}.json")
    finally:
        for aside in asides:
            with suppress(OSError):
                aside.unlink(missing_ok=True)


class Parts:
    """The parts of one output, held by this process alone. A context manager; leaving it keeps them, for a next run."""

    def __init__(self, prefix: str | Path, run: dict[str, Any]):
        """`run`: what the parts depend on, plain values by their name. Raises DataError where another run holds the
        output, where it cannot be written, or where there are leftovers of a run that was not the same."""
        self.directory = Path(f"{prefix}.parts")
        self.paths = paths_of(prefix)
        self.index = Index()
        """Of everything merged so far."""
        self.merged = 0
        """Parts merged so far: the number of the next one."""
        self.skipped: Counter[str] = Counter()
        """Faults so far by reason."""
        with writing(self.directory):
            self._lock = _lock(self.directory)
            try:
                self._resume(json.loads(json.dumps({"layout": LAYOUT_VERSION, **run})))
            except BaseException:
                self._lock.close()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # on a full disk closing fails again, and would hide the error that brought us here
            self._bin.close()
        self._lock.close()

    def is_done(self, number: int) -> bool:
        """Whether this part has been written, merged or not."""
        return (self.directory / f"{number:06d}.json").exists()

    def merge(self) -> int:
        """Append the next part, and return the number of its samples. Raises DataError where the disk is full, or the
        part is not whole."""
        with writing(self.directory):
            part, num_samples = self._read(self.merged), 0
            path = self.directory / f"{self.merged:06d}.bin"
            end = self._bin.tell() + path.stat().st_size
            with path.open("rb") as file:
                shutil.copyfileobj(file, self._bin, 2**20)
            self._bin.flush()
            os.fdatasync(self._bin.fileno())  # or a power cut could lose what is about to be deleted
            num_samples = self._take(part)
            if self._bin.tell() != end or self.index.bin_bytes != end:
                raise DataError(f"{path}: does not fit its .json; delete {self.directory} to start over")
            path.unlink()
        return num_samples

    def faults(self) -> Iterator[Fault]:
        """Every fault merged so far, in order."""
        for number in range(self.merged):
            for where, reason, detail in self._read(number)["faults"]:
                yield Fault(where, SampleFault(reason, detail))

    def finish(self, origin: dict[str, Any]) -> dict[str, Any]:
        """Put PREFIX.bin, .idx and .json in place, delete the parts, and return the content of PREFIX.json."""
        with writing(self.paths[2]):
            self._bin.close()
            asides = self.directory / _MERGED, self.directory / "merged.idx", self.directory / "merged.json"
            info = self.index.write(asides[1], asides[2], origin)
            put_in_place(asides, self.paths)
            self.discard()
        return info

    def discard(self) -> None:
        """Delete the parts."""
        with suppress(OSError):
            self._bin.close()
        (self.directory / _RUN).unlink(missing_ok=True)  # first: without it nothing here is taken for a leftover
        self._clear(_OURS)
        (self.directory / "lock").unlink(missing_ok=True)
        with suppress(OSError):  # something lies there that is not ours
            self.directory.rmdir()

    def _resume(self, run: dict[str, Any]) -> None:
        path, merged = self.directory / _RUN, self.directory / _MERGED
        if path.exists():
            self._check_run(path, run)
            while self.is_done(self.merged) and not (self.directory / f"{self.merged:06d}.bin").exists():
                self._take(self._read(self.merged))
            size = self.index.bin_bytes
            if size and not merged.exists() and self.paths[0].is_file() and self.paths[0].stat().st_size == size:
                # The run died while it put its files in place.
                self.paths[2].unlink(missing_ok=True)
                os.replace(self.paths[0], merged)
            if size and (not merged.exists() or merged.stat().st_size < size):
                raise DataError(f"{merged}: not whole; delete {self.directory} to start over")
        self._clear(re.compile(r".*\.tmp") if path.exists() else _OURS)
        if not path.exists():
            path.with_suffix(".tmp").write_text(json.dumps(run), encoding="utf-8")
            os.replace(path.with_suffix(".tmp"), path)
        self._bin = merged.open("ab")
        self._bin.truncate(self.index.bin_bytes)
        self._bin.seek(0, os.SEEK_END)

    def _clear(self, names: re.Pattern[str]) -> None:
        for leftover in self.directory.iterdir():
            if names.fullmatch(leftover.name):
                leftover.unlink()

    def _check_run(self, path: Path, run: dict[str, Any]) -> None:
        try:
            there = json.loads(path.read_bytes())
        except ValueError as error:
            raise DataError(f"{path}: damaged ({error}); delete {self.directory} to start over") from error
        other = [key for key in sorted({*run, *there}) if run.get(key) != there.get(key)]
        if other:
            raise DataError(
                f"{self.directory}: left by a run with another {', '.join(other)}; give what was given then to go on "
                "with it, or delete the directory to start over"
            )

    def _read(self, number: int) -> dict[str, Any]:
        path = self.directory / f"{number:06d}.json"
        try:
            part: dict[str, Any] = json.loads(path.read_bytes())
        except ValueError as error:
            raise DataError(f"{path}: damaged ({error}); delete {self.directory} to start over") from error
        return part

    def _take(self, part: dict[str, Any]) -> int:
        self.index.extend(part["index"])
        self.skipped.update(reason for _, reason, _ in part["faults"] if reason in REASONS)
        self.merged += 1
        return len(part["index"]["tokens"]) + len(part["faults"])


def _lock(directory: Path) -> Any:
    """An open file that no other process has locked. The lock ends with this process, however that ends."""
    path = directory / "lock"
    deadline = time.monotonic() + PATIENCE_S
    while True:
        directory.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
            file.close()  # the run that held it has ended, and deleted it, between our two calls
        except FileNotFoundError:
            file.close()
        except BlockingIOError:
            file.close()
            if time.monotonic() < deadline:
                time.sleep(0.1)
                continue
            raise DataError(
                f"{directory}: another run is writing this output; wait until it ends, or choose another --output"
            ) from None
