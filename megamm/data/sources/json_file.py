"""JSON lists and JSON lines. A file is cut at its items without parsing them: memory does not grow with it."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from megamm.data.faults import Fault, SampleFault
from megamm.data.sources import piece as limits
from megamm.data.sources.piece import Piece, Span, cut
from megamm.data.sources.record import Record, parse_json, record
from megamm.errors import DataError

_BOM = b"\xef\xbb\xbf"
_BLOCK = 2**20
_IN_STRING = re.compile(rb'["\\]')
_IN_LIST = re.compile(rb'["\[\]{},]')
_DEEPER = re.compile(rb'["\[\]{}]')
_FLAT = rb'(?:[^"\[\]{}]++|"[^"\\]*+(?:\\.[^"\\]*+)*+")*+'
_CLOSED = re.compile(_FLAT + rb"(?:[\[{]" + _FLAT + rb"[\]}]" + _FLAT + rb")*+", re.DOTALL)
"""Whole strings, what is between them, and brackets around nothing but these: most of an item, passed in one step."""


def split(path: Path) -> Iterator[Piece]:
    """Pieces of a file. Raises DataError where it cannot be read, or is a list that does not end as one."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(4)
        if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise DataError(f"{path}: UTF-16, and JSON must be UTF-8; convert it (iconv -f UTF-16 -t UTF-8)")
        start = len(_BOM) if head.startswith(_BOM) else 0
        if _first_byte(file, start) == b"[":
            if _last_byte(file, size) != b"]":
                raise DataError(f"{path}: a JSON list that is never closed: the file is cut; fetch it again")
            records = _name("item", _items(file, path))
        else:
            records = _name("line", _lines(file, start))
        yield from cut(path, records, size)


def read(piece: Piece) -> Iterator[Record | Fault]:
    """Records of a piece; a bad one as Fault."""
    with piece.path.open("rb") as file:
        for name, spans in piece.records:
            where = f"{piece.path.name} {name}"
            try:
                if not spans:
                    raise SampleFault("record_too_long", f"more than {limits.RECORD_BYTES} bytes")
                file.seek(spans[0][1])
                yield record(where, parse_json(file.read(spans[0][2])))
            except SampleFault as fault:
                yield Fault(where, fault)


def _name(kind: str, stretches: Iterator[tuple[int, int, int]]) -> Iterator[tuple[str, tuple[Span, ...]]]:
    for number, start, length in stretches:
        yield f"{kind} {number}", ((("json", start, length),) if length <= limits.RECORD_BYTES else ())


def _lines(file: BinaryIO, start: int) -> Iterator[tuple[int, int, int]]:
    """Number, first byte and length of every line that is not blank."""
    file.seek(start)
    number = 0
    while line := file.readline(_BLOCK):
        number += 1
        length, is_blank = len(line), not line.strip()
        while not line.endswith(b"\n") and (line := file.readline(_BLOCK)):
            length, is_blank = length + len(line), is_blank and not line.strip()
        if not is_blank:
            yield number, start, length
        start += length


def _items(file: BinaryIO, path: Path) -> Iterator[tuple[int, int, int]]:
    """Number, first byte and length of what stands between the commas of the outermost list."""
    number = depth = start = base = at = 0
    in_string = is_closed = False
    file.seek(0)
    while block := file.read(_BLOCK):
        if is_closed and block.strip():
            raise _more_than_a_list(path)
        while not is_closed:
            if depth > 1 and not in_string:
                passed = _CLOSED.match(block, at)
                at = passed.end() if passed else at
            stop = (_IN_STRING if in_string else _IN_LIST if depth == 1 else _DEEPER).search(block, at)
            if stop is None:
                break
            at, byte = stop.end(), stop.group()
            if byte == b"\\":
                at += 1  # and what it escapes, be it in the next block
            elif byte == b'"':
                in_string = not in_string
            elif byte in b"[{":
                depth += 1
                if depth == 1:
                    start = base + at
            else:
                if byte != b",":
                    depth -= 1
                is_closed = depth == 0
                if depth == 0 or byte == b",":
                    length = base + at - 1 - start
                    number += 1
                    if not is_closed or number > 1 or not _is_blank(file, start, length):
                        yield number, start, length
                    start = base + at
                if is_closed and block[at:].strip():
                    raise _more_than_a_list(path)
        base += len(block)
        at = max(at - len(block), 0)
    if not is_closed:
        raise DataError(f"{path}: a JSON list that is never closed, in item {number + 1}; mend it or fetch it again")


def _more_than_a_list(path: Path) -> DataError:
    return DataError(f"{path}: something stands behind the end of the JSON list; mend it or fetch the file again")


def _is_blank(file: BinaryIO, start: int, length: int) -> bool:
    return length < _BLOCK and not os.pread(file.fileno(), length, start).strip()


def _first_byte(file: BinaryIO, start: int) -> bytes:
    file.seek(start)
    while block := file.read(_BLOCK):
        if block.strip():
            return block.lstrip()[:1]
    return b""


def _last_byte(file: BinaryIO, size: int) -> bytes:
    while size > 0:
        start = max(size - _BLOCK, 0)
        block = os.pread(file.fileno(), size - start, start).rstrip()
        if block:
            return block[-1:]
        size = start
    return b""
