"""Files of conversations -> a stream of records, in the files' order, in pieces that any process can read. Decodes no
picture."""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from megamm.data.faults import Fault
from megamm.data.sources import json_file, parquet_file, tar_file
from megamm.data.sources.files import read_image
from megamm.data.sources.piece import Piece
from megamm.data.sources.record import Media, Record
from megamm.errors import DataError

__all__ = ["FORMATS", "Fault", "Media", "Piece", "Record", "Source", "read_image", "read_piece"]

_MODULES: dict[str, ModuleType] = {"json": json_file, "parquet": parquet_file, "tar": tar_file}
FORMATS = ("auto", *_MODULES)
"""What a file can be; `json` stands for lists and lines, in either layout."""

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstd", b"PK\3\4": "zip"}
_SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet", ".tar")


class Source:
    """Records of some files, or of the files in directories, in the order given (in a directory: by name)."""

    def __init__(self, paths: list[Path], form: str = "auto"):
        """`form`: one of FORMATS. Raises DataError where a file cannot be read or is of no known format."""
        if form not in FORMATS:
            raise DataError(f"--format: unknown {form!r}; choose one of {', '.join(FORMATS)}")
        self.files = [(path, _detect(path) if form == "auto" else form) for path in _listed(paths)]
        """Every file and its format."""
        self._stamps = self.stamps()

    @property
    def size(self) -> int:
        """What the sizes of all pieces together come to; a measure of progress."""
        if any(form == "parquet" for _, form in self.files):
            return sum(piece.size for path, form in self.files for piece in _MODULES[form].split(path))
        return sum(size for _, size, _ in self._stamps)

    def pieces(self) -> Iterator[tuple[int, str, Piece]]:
        """Number, format and place of each piece. Raises DataError where a file is damaged."""
        number = 0
        for path, form in self.files:
            for piece in self.pieces_of(path, form):
                yield number, form, piece
                number += 1

    def pieces_of(self, path: Path, form: str) -> Iterator[Piece]:
        """Pieces of one of the files. Raises DataError where it is damaged."""
        try:
            yield from _MODULES[form].split(path)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error})") from error

    def __iter__(self) -> Iterator[Record | Fault]:
        """Every record once; a bad one as Fault."""
        for _, form, piece in self.pieces():
            yield from read_piece(form, piece)

    def stamps(self) -> list[tuple[str, int, int]]:
        """Name, bytes and time of change (ns) of every file, now."""
        try:
            return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path, _ in self.files]
        except OSError as error:
            raise DataError(f"--input: {error}") from error

    def changed(self) -> list[str]:
        """Names of the files that have changed since this source was made."""
        return [now[0] for before, now in zip(self._stamps, self.stamps(), strict=True) if before != now]


def read_piece(form: str, piece: Piece) -> Iterator[Record | Fault]:
    """Records of a piece, in any process; a bad one as Fault. Raises DataError where the file cannot be read."""
    records: Any = _MODULES[form].read(piece)
    try:
        yield from records
    except OSError as error:
        raise DataError(f"{piece.path}: cannot be read ({error})") from error


def _listed(paths: list[Path]) -> list[Path]:
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES and file.is_file())
            if not found:
                raise DataError(f"{path}: holds no file named {', '.join('*' + suffix for suffix in _SUFFIXES)}")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise DataError(f"{path}: no such file; --input names files of conversations, or directories of them")
    return files


def _detect(path: Path) -> str:
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    for magic, name in _COMPRESSED.items():
        if head.startswith(magic):
            raise DataError(f"{path}: compressed with {name}; decompress it first")
    if head.startswith(b"PAR1"):
        return "parquet"
    return "tar" if head[257:262] == b"ustar" or (path.suffix == ".tar" and head[:1] not in b"[{") else "json"
