"""Files of conversations -> a stream of records, in the file's order. Opens no picture."""

import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megamm.data.faults import SampleFault
from megamm.data.text import Turn
from megamm.errors import DataError

_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One conversation as the source has it."""

    where: str
    """Place in the source, such as `llava.json item 17`, counted from 1."""
    id: str
    images: list[str]
    """Paths relative to the image directory, in order; empty for text alone."""
    turns: list[Turn]
    videos: list[str] = field(default_factory=list)
    """Paths like those of `images`."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A record that cannot be used, and why."""

    where: str
    fault: SampleFault


class LlavaSource:
    """LLaVA's format: a JSON list, or one JSON object per line. UTF-8, with or without a BOM."""

    def __init__(self, path: Path):
        """Raises DataError where the file cannot be read, or begins like a list and is not JSON."""
        self._path = path
        self._items: list[Any] | None = None
        try:
            with path.open("rb") as file:
                lines = (line.removeprefix(_BOM).strip() for line in file)
                is_list = next(filter(None, lines), b"").startswith(b"[")
                file.seek(0)
                if is_list:
                    self._items = json.loads(file.read().removeprefix(_BOM))
                self._length = sum(1 for line in file if line.strip()) if self._items is None else len(self._items)
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{path}: not LLaVA JSON or JSON lines in UTF-8 ({error})") from error

    def __len__(self) -> int:
        """Records, bad ones included."""
        return self._length

    def __iter__(self) -> Iterator[Record | Fault]:
        """Every record once; a bad one as Fault."""
        for where, item in self._enumerate():
            try:
                yield _record(where, json.loads(item) if isinstance(item, bytes) else item)
            except SampleFault as fault:
                yield Fault(where, fault)
            except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
                yield Fault(where, SampleFault("bad_record", f"not JSON: {error}"))

    def _enumerate(self) -> Iterator[tuple[str, Any]]:
        if self._items is not None:
            yield from ((f"{self._path.name} item {i}", item) for i, item in enumerate(self._items, 1))
            return
        with self._path.open("rb") as file:
            for i, line in enumerate(file, 1):
                if line.strip():
                    yield f"{self._path.name} line {i}", line.removeprefix(_BOM)


def read_image(directory: Path, name: str) -> bytes:
    """Content of the picture or video `name` under `directory`, which must be resolved. Links are followed, but never
    out of it.

    Raises SampleFault (image_outside, image_missing).
    """
    try:
        path = Path(os.path.realpath(directory / name))
        if not path.is_relative_to(directory):
            raise SampleFault("image_outside", name)
        if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe or a device would wait for ever
            raise SampleFault("image_missing", f"{name} is no file")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise SampleFault("image_missing", f"{name!r}: {error}") from error


def _record(where: str, item: Any) -> Record:
    if not isinstance(item, dict):
        raise SampleFault("bad_record", f"found a {type(item).__name__}")
    conversation = item.get("conversations")
    images, videos = (
        [] if paths in (None, "") else paths if isinstance(paths, list) else [paths]
        for paths in (item.get("image"), item.get("video"))
    )
    if not isinstance(conversation, list) or not all(isinstance(turn, dict) for turn in conversation):
        raise SampleFault("bad_record", "`conversations` is not a list of objects")
    turns = [(turn.get("from"), turn.get("value")) for turn in conversation]
    for value in [*images, *videos, *(value for turn in turns for value in turn)]:
        if not isinstance(value, str):
            raise SampleFault("bad_record", f"`image`, `video`, `from` or `value` is {value!r}, not a string")
        try:
            value.encode()
        except UnicodeEncodeError as error:  # a lone surrogate, which JSON can spell and no tokenizer can read
            raise SampleFault("bad_record", f"not valid Unicode: {error}") from error
    return Record(where=where, id=str(item.get("id", "")), images=images, turns=turns, videos=videos)
