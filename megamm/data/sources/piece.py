"""Numbered pieces of a source: where some records lie in a file, so that any process can read them by itself."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megamm.errors import DataError

PIECE_RECORDS = 256
PIECE_BYTES = 32 * 2**20
"""A piece is closed when it holds this many records, or when what must be read for them is this much."""

RECORD_BYTES = 64 * 2**20
"""A longer record (a line, an item of a list, a member of a tar) is a fault, and is never in memory."""

Span = tuple[str, int, int]
"""What a stretch of a file is, its first byte and its length."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Some successive records of one file. What `records` say is the format's own matter."""

    path: Path
    records: tuple[tuple[str, tuple[Span, ...]], ...]
    """Name of each record in its file, such as `line 17`, and where its parts lie."""
    size: int
    """Bytes of the file from this piece's beginning to the next one's: a measure of progress."""


def cut(path: Path, records: Iterable[tuple[str, tuple[Span, ...]]], file_size: int) -> Iterator[Piece]:
    """Successive records of a file -> its pieces, the same ones every time."""
    held: list[tuple[str, tuple[Span, ...]]] = []
    num_bytes = begin = 0
    stream = iter(records)
    while True:
        try:
            name, spans = next(stream)
        except StopIteration:
            break
        except DataError:
            if held:  # a damaged file, of which this much can still be looked at
                yield Piece(path, tuple(held), file_size - begin)
            raise
        first = min((start for _, start, _ in spans), default=begin)
        length = sum(length for _, _, length in spans)
        if held and (len(held) == PIECE_RECORDS or num_bytes + length > PIECE_BYTES):
            yield Piece(path, tuple(held), first - begin)
            held, num_bytes, begin = [], 0, first
        held.append((name, spans))
        num_bytes += length
    if held:
        yield Piece(path, tuple(held), file_size - begin)
