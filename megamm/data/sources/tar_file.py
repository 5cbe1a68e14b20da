"""WebDataset tars: successive members of one name are a sample: pictures, and a .json or .txt. Nothing is unpacked."""

import os
import re
import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path, PurePosixPath

from megamm.data.faults import Fault, SampleFault
from megamm.data.sources import piece as limits
from megamm.data.sources.files import FILE_BYTES, VIDEO_BYTES
from megamm.data.sources.piece import Piece, Span, cut
from megamm.data.sources.record import Media, Record, caption, parse_json, record
from megamm.errors import DataError

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
VIDEOS = ("mp4", "webm", "mkv", "mov", "avi")
_NUMBER = re.compile(r"\d+")
_TWO_ZERO_BLOCKS = 2 * tarfile.BLOCKSIZE

_Member = tuple[str, Span]
"""Its sample's name, and its extensions, first byte and length; below zero, the first says what is wrong with it."""


def split(path: Path) -> Iterator[Piece]:
    """Pieces of a file. Raises DataError where it is no tar, compressed, or cut."""
    samples = groupby(_members(path), key=lambda member: member[0])
    yield from cut(path, ((key, tuple(span for _, span in members)) for key, members in samples), path.stat().st_size)


def read(piece: Piece) -> Iterator[Record | Fault]:
    """Records of a piece; a bad one as Fault."""
    with piece.path.open("rb") as file:
        for name, spans in piece.records:
            where = f"{piece.path.name} {name}"
            try:
                parts: dict[str, bytes] = {}
                for extension, start, length in spans:
                    if length < 0 or extension in parts:
                        raise SampleFault("bad_record", extension if length < 0 else f"two members .{extension}")
                    if length > _most_bytes(_kind(extension)):
                        raise SampleFault("record_too_long", f".{extension} has {length} bytes")
                    file.seek(start)
                    parts[extension] = file.read(length)
                yield _record(where, name.removeprefix("sample "), parts)
            except SampleFault as fault:
                yield Fault(where, fault)


def _record(where: str, key: str, parts: dict[str, bytes]) -> Record:
    images: list[Media] = [parts[name] for name in sorted(parts, key=_order) if _kind(name) in IMAGES]
    videos: list[Media] = [parts[name] for name in sorted(parts, key=_order) if _kind(name) in VIDEOS]
    item = parse_json(parts["json"]) if "json" in parts else None
    if isinstance(item, dict) and not item.keys().isdisjoint(("conversations", "messages")):
        # Its paths are those of the files that were packed, and of no use here.
        beside = {"image": None, "images": images} if images else {}
        return record(where, {"id": key} | item | beside | ({"video": None, "videos": videos} if videos else {}))
    if "txt" not in parts:
        raise SampleFault("bad_record", f"no .txt and no .json with turns, only {', '.join(parts) or 'nothing'}")
    try:
        return caption(where, key, parts["txt"].decode().strip(), images)
    except UnicodeDecodeError as error:
        raise SampleFault("bad_record", f".txt: {error}") from error


def _members(path: Path) -> Iterator[_Member]:
    try:
        with tarfile.open(path, "r:", errors="backslashreplace") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                if not member.isdir():
                    yield _member(member)
            _check_end(path, tar.offset)
    except (tarfile.TarError, OSError, ValueError, EOFError, OverflowError) as error:
        raise DataError(f"{path}: not readable as tar ({error}); fetch it again, and decompress it first") from error


def _member(member: tarfile.TarInfo) -> _Member:
    name = PurePosixPath(member.name)
    stem, _, extension = name.name.partition(".")
    key = f"sample {name.parent / stem}"
    if name.is_absolute() or ".." in name.parts:
        return key, (f"member {member.name!r} leads out of the tar", member.offset, -1)
    if not member.isreg() or member.issparse():
        return key, (f"member {member.name!r} is a link or device, not a plain file", member.offset, -1)
    return key, (extension.lower(), member.offset_data, member.size)


def _check_end(path: Path, offset: int) -> None:
    """tarfile takes a damaged header for the end."""
    with path.open("rb") as file:
        rest = os.pread(file.fileno(), _TWO_ZERO_BLOCKS, offset)
    if rest.strip(b"\0"):
        raise DataError(f"{path}: damaged at byte {offset}; fetch it again")


def _most_bytes(kind: str) -> int:
    return FILE_BYTES if kind in IMAGES else VIDEO_BYTES if kind in VIDEOS else limits.RECORD_BYTES


def _kind(extension: str) -> str:
    return extension.rpartition(".")[2]


def _order(extension: str) -> list[tuple[int, str]]:
    """0.jpg, 1.jpg, 10.jpg in the order of their numbers."""
    return [(int(part) if _NUMBER.fullmatch(part) else -1, part) for part in extension.split(".")]
