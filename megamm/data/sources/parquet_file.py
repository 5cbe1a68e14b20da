"""Parquet as Hugging Face's `datasets` writes it: a piece is a row group. The only file that imports pyarrow."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megamm.data.faults import Fault, SampleFault
from megamm.data.sources.piece import Piece
from megamm.data.sources.record import Record, record
from megamm.errors import DataError

_COLUMNS = ("id", "conversations", "messages", "image", "images", "video", "videos")
_ROWS = 16
"""Read at once: pictures lie in the rows."""


def split(path: Path) -> Iterator[Piece]:
    """Pieces of a file. Raises DataError where it is no Parquet, has no turns, or pyarrow is missing."""
    with _opened(path) as file:
        names = file.schema_arrow.names
        if not {"conversations", "messages"} & set(names):
            raise DataError(
                f"{path}: no column `conversations` or `messages`, but {', '.join(names)}; rename the one that holds "
                "the turns"
            )
        row = 1
        for group in range(file.num_row_groups):
            meta = file.metadata.row_group(group)
            if meta.num_rows:
                yield Piece(path, ((f"row {row}", (("row group", group, row),)),), meta.total_byte_size)
            row += meta.num_rows


def read(piece: Piece) -> Iterator[Record | Fault]:
    """Records of a piece; a bad one as Fault. Raises DataError where the row group is damaged."""
    _, group, row = piece.records[0][1][0]
    with _opened(piece.path) as file:
        columns = [name for name in _COLUMNS if name in file.schema_arrow.names]
        for batch in file.iter_batches(batch_size=_ROWS, row_groups=[group], columns=columns):
            for i in range(batch.num_rows):
                yield _record(f"{piece.path.name} row {row}", batch, i)
                row += 1


def _record(where: str, batch: Any, i: int) -> Record | Fault:
    try:
        item = {name: column[i].as_py() for name, column in zip(batch.schema.names, batch.columns, strict=True)}
        return record(where, item)
    except SampleFault as fault:
        return Fault(where, fault)
    except ValueError as error:  # text that is not UTF-8
        return Fault(where, SampleFault("bad_record", str(error)))


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{path}: reading Parquet needs pyarrow (pip install 'megamm[data]')") from error
    try:
        # Without these two, the whole row group, pictures included, would be in memory.
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**20) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())  # it comes in several lines
        raise DataError(f"{path}: not readable as Parquet ({reason}); fetch it again") from error
