"""The dataset on disk: PREFIX.bin and PREFIX.idx in megatron-core's multimodal indexed format, and PREFIX.json.

Everything in .bin is int32. A document is one sequence of mode TEXT (ids, one IMAGE per picture), one of mode PICTURE
per picture (the number of padding bytes, then the compressed file padded to whole words; no word for one more view of
the picture before) and one of mode SPANS (first and last + 1 of each target span over the ids). Stock
`IndexedDataset(prefix, multimodal=True)` reads it. This reader is our own: it opens without importing megatron, checks
what it opens, and copies what it hands out (megatron's arrays are views of a map that may be gone). What the ids mean
is no matter of this file.
"""

import json
import os
import struct
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from megamm.batch import IMAGE
from megamm.errors import DataError

FORMAT_VERSION = 1
"""Of PREFIX.json and of the three modes. A reader refuses any other."""

TEXT, PICTURE, SPANS = 0, 1, 2

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, documents + 1
_VERSION, _INT32 = 1, 4
_BLOCK = 2**15


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError inside into a DataError that names `path` and the remedy."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error}); make room, or choose another place") from error


def paths_of(prefix: str | Path) -> tuple[Path, Path, Path]:
    """PREFIX.bin, PREFIX.idx and PREFIX.json."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), Path(f"{prefix}.json")


class Index:
    """What .idx says of a .bin that is being written, and the counts that PREFIX.json gives: 40 bytes a document."""

    def __init__(self) -> None:
        self._lengths, self._modes = array("i"), array("b")
        self._documents = array("q", [0])
        self._num_tokens, self._num_images = array("q"), array("q")
        self._num_targets = 0
        self.bin_bytes = 0
        """Length of the .bin."""

    def add(self, ids: np.ndarray, images: Sequence[bytes | None], spans: np.ndarray) -> Iterator[bytes]:
        """Append a document (see Writer.add), and give what to write for it."""
        yield self._sequence(TEXT, np.asarray(ids, dtype="<i4").tobytes())
        for image in images:
            if image is None:
                yield self._sequence(PICTURE, b"")
                continue
            pad = -len(image) % 4
            yield self._sequence(PICTURE, struct.pack("<i", pad) + image + bytes(pad))
        yield self._sequence(SPANS, np.asarray(spans, dtype="<i4").tobytes())
        self._documents.append(len(self._lengths))
        self._num_tokens.append(len(ids))
        self._num_images.append(len(images))
        self._num_targets += int(np.sum(spans[:, 1] - spans[:, 0]))

    def extend(self, other: dict[str, Any]) -> None:
        """Append the documents of another index, as its `as_dict` has them."""
        first = len(self._lengths)
        self._lengths.extend(other["lengths"])
        self._modes.extend(other["modes"])
        self._documents.extend(first + start for start in other["documents"][1:])
        self._num_tokens.extend(other["tokens"])
        self._num_images.extend(other["images"])
        self._num_targets += other["targets"]
        self.bin_bytes += 4 * sum(other["lengths"])

    def as_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON."""
        return {
            "lengths": self._lengths.tolist(),
            "modes": self._modes.tolist(),
            "documents": self._documents.tolist(),
            "tokens": self._num_tokens.tolist(),
            "images": self._num_images.tolist(),
            "targets": self._num_targets,
        }

    def __len__(self) -> int:
        """Documents."""
        return len(self._num_tokens)

    def num_longer(self, max_tokens: int, tokens_per_image: int) -> int:
        """Documents that have more tokens than `max_tokens` when every picture is `tokens_per_image` of them."""
        tokens, images = np.frombuffer(self._num_tokens, np.int64), np.frombuffer(self._num_images, np.int64)
        return int(np.count_nonzero(tokens + images * (tokens_per_image - 1) > max_tokens))

    def write(self, idx_path: Path, json_path: Path, origin: dict[str, Any]) -> dict[str, Any]:
        """Write the two files, and return the content of the second; see Writer.finish."""
        lengths = np.frombuffer(self._lengths, dtype="<i4")
        sizes = lengths.astype("<i8") * 4
        with idx_path.open("wb") as idx:
            idx.write(_HEADER.pack(_MAGIC, _VERSION, _INT32, len(lengths), len(self._documents)))
            idx.write(lengths.tobytes())
            idx.write((np.cumsum(sizes) - sizes).astype("<i8").tobytes())
            idx.write(np.frombuffer(self._documents, dtype="<i8").tobytes())
            idx.write(np.frombuffer(self._modes, dtype="i1").tobytes())
        tokens, images = np.frombuffer(self._num_tokens, np.int64), np.frombuffer(self._num_images, np.int64)
        info = {
            "format_version": FORMAT_VERSION,
            **origin,
            "documents": len(tokens),
            "tokens": int(tokens.sum()),
            "images": int(images.sum()),
            "targets": self._num_targets,
            "tokens_per_document": _statistics(tokens),
            "images_per_document": _statistics(images),
            "bin_bytes": self.bin_bytes,
            "idx_bytes": idx_path.stat().st_size,
        }
        json_path.write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
        return info

    def _sequence(self, mode: int, content: bytes) -> bytes:
        self._lengths.append(len(content) // 4)
        self._modes.append(mode)
        self.bin_bytes += len(content)
        return content


class Writer:
    """Writes a dataset aside and renames it at the end, PREFIX.json last: where that file is, the dataset is whole.

    A context manager; leaving it without `finish` removes what was written.
    """

    def __init__(self, prefix: str | Path):
        """Raises DataError where PREFIX.bin.tmp cannot be written."""
        self._paths = paths_of(prefix)
        self._asides = tuple(path.with_name(path.name + ".tmp") for path in self._paths)
        self._index = Index()
        with writing(self._asides[0]):
            self._paths[0].parent.mkdir(parents=True, exist_ok=True)
            self._bin = self._asides[0].open("wb")

    def add(self, ids: np.ndarray, images: Sequence[bytes | None], spans: np.ndarray) -> None:
        """Append one document: int32 ids [T], the compressed picture of each IMAGE in it (None: one more view of the
        one before), int32 target spans [N, 2]."""
        with writing(self._asides[0]):
            for content in self._index.add(ids, images, spans):
                self._bin.write(content)

    def finish(self, origin: dict[str, Any]) -> dict[str, Any]:
        """Write the index and PREFIX.json, put all in place, and return the content of PREFIX.json.

        `origin` says what made the dataset (tokenizer, family, template ...); counts, sizes and statistics are added.
        """
        with writing(self._paths[2]):
            return self._finish(origin)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # on a full disk closing fails again, and would hide the error that brought us here
            self._bin.close()
        for aside in self._asides:
            aside.unlink(missing_ok=True)

    def _finish(self, origin: dict[str, Any]) -> dict[str, Any]:
        self._bin.close()
        info = self._index.write(self._asides[1], self._asides[2], origin)
        put_in_place(self._asides, self._paths)
        return info


def put_in_place(asides: Sequence[Path], paths: Sequence[Path]) -> None:
    """Rename .bin, .idx and .json."""
    paths[2].unlink(missing_ok=True)  # between the renames the old .json must not vouch for new data
    for aside, path in zip(asides, paths, strict=True):
        os.replace(aside, path)


def _statistics(values: np.ndarray) -> dict[str, float]:
    """Mean, a few quantiles and the largest: what a planner needs to estimate a step. IMAGE counts as one token."""
    if not len(values):
        return {}
    p50, p90, p99, largest = (int(q) for q in np.quantile(values, (0.5, 0.9, 0.99, 1.0), method="inverted_cdf"))
    return {"mean": round(float(values.mean()), 3), "p50": p50, "p90": p90, "p99": p99, "max": largest}


class Reader:
    """Documents of a dataset by number, memory-mapped. Checked when opened; survives pickling by opening again."""

    def __init__(self, prefix: str | Path):
        """Raises DataError where a file is absent, another version, or does not fit the others."""
        self.prefix = str(prefix)
        bin_path, idx_path, json_path = paths_of(prefix)
        self.info = _read_info(json_path)
        """Content of PREFIX.json."""
        for path, key in ((bin_path, "bin_bytes"), (idx_path, "idx_bytes")):
            size = path.stat().st_size if path.is_file() else None
            if size != self.info[key]:
                raise DataError(f"{path}: has {size} bytes where {json_path} says {self.info[key]}; preprocess again")
        self._offsets, self._lengths, self._modes, self._documents = _read_index(idx_path, self.info["idx_bytes"])
        _check_index(self._offsets, self._lengths, self._modes, self._documents, self.info["bin_bytes"], idx_path)
        if len(self) != self.info["documents"]:
            raise DataError(f"{idx_path}: {len(self)} documents, {json_path} says {self.info['documents']}")
        # An empty file cannot be mapped, and a dataset without documents is a legal one.
        mapped = np.memmap(bin_path, dtype="<i4", mode="r") if self.info["bin_bytes"] else np.empty(0, dtype="<i4")
        self._bin = np.asarray(mapped)  # no longer a memmap, of which every slice is made in Python

    def __reduce__(self) -> tuple[type["Reader"], tuple[str]]:
        return Reader, (self.prefix,)  # a map would be pickled with its whole content

    def __len__(self) -> int:
        """Documents."""
        return len(self._documents) - 1

    @property
    def num_ids(self) -> np.ndarray:
        """int64 [documents]: ids of each document, an image counted as one."""
        return self._lengths[self._documents[:-1]].astype(np.int64)

    @property
    def num_images(self) -> np.ndarray:
        """int64 [documents]: images of each document, every view of a picture counted."""
        return np.diff(self._documents) - 2

    def text(self, document: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 [T] and target spans int32 [N, 2] of a document, copied. Raises DataError where they do not fit."""
        first, last = self._range(document)
        ids, spans = self._sequence(first).copy(), self._sequence(last).copy()
        if np.count_nonzero(ids == IMAGE) != last - first - 1:
            raise DataError(f"{self.prefix}: document {document} has other pictures than its ids say; preprocess again")
        bounds = spans.tolist()
        if len(bounds) % 2 or not all(0 <= a <= b <= len(ids) for a, b in zip(bounds[::2], bounds[1::2], strict=True)):
            raise DataError(f"{self.prefix}: document {document} has target spans outside its ids; preprocess again")
        return ids, spans.reshape(-1, 2)

    def views(self, document: int) -> list[tuple[int, int]]:
        """The pictures of a document: number of the image that holds it, and images (views) that it stands for.

        Raises DataError where the first holds none."""
        first, last = self._range(document)
        lengths = self._lengths[first + 1 : last].tolist()
        if lengths and not lengths[0]:
            raise DataError(f"{self.prefix}: document {document} begins with a view of no picture; preprocess again")
        holders = [k for k, length in enumerate(lengths) if length]
        return [(k, following - k) for k, following in pairwise([*holders, len(lengths)])]

    def image(self, document: int, image: int) -> bytes:
        """Compressed bytes of one picture of a document, as its file had them. DataError for one that holds none."""
        first, last = self._range(document)
        if not 0 <= image < last - first - 1:
            raise IndexError(f"document {document} has {last - first - 1} images, not one numbered {image}")
        words = self._sequence(first + 1 + image)
        pad = int(words[0]) if len(words) else -1
        if not 0 <= pad <= 3 or pad > 4 * (len(words) - 1):
            raise DataError(f"{self.prefix}: document {document} image {image} is damaged; preprocess again")
        return words.view(np.uint8)[4 : 4 * len(words) - pad].tobytes()

    def _range(self, document: int) -> tuple[int, int]:
        """First and last sequence of a document: its text and its spans."""
        if not 0 <= document < len(self):
            raise IndexError(f"{self.prefix} has {len(self)} documents, not one numbered {document}")
        return int(self._documents[document]), int(self._documents[document + 1]) - 1

    def _sequence(self, i: int) -> np.ndarray:
        """A view of the map."""
        start = self._offsets[i] // 4
        return self._bin[start : start + self._lengths[i]]


def _read_info(path: Path) -> dict[str, Any]:
    try:
        info = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(
            f"{path}: not found; without it a dataset is not whole. Preprocess (again), or give the "
            "prefix that was its --output"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path}: not readable as JSON ({error}); preprocess again") from error
    version = info.get("format_version") if isinstance(info, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(f"{path}: format version {version!r}, this megamm reads {FORMAT_VERSION}; preprocess again")
    if "blend" in info:
        raise DataError(f"{path}: a blend of datasets; give one dataset")
    for key in ("documents", "bin_bytes", "idx_bytes"):
        if not isinstance(info.get(key), int):
            raise DataError(f"{path}: `{key}` is {info.get(key)!r}, not a number; preprocess again")
    return info


def _read_index(path: Path, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
        if len(header) < _HEADER.size:
            raise DataError(f"{path}: too short for an index; preprocess again")
        magic, version, dtype, sequences, documents = _HEADER.unpack(header)
        if (magic, version, dtype) != (_MAGIC, _VERSION, _INT32):
            raise DataError(f"{path}: not an int32 index of megatron's version {_VERSION}; preprocess again")
        if size != _HEADER.size + sequences * (4 + 8 + 1) + documents * 8 or documents < 1:
            raise DataError(f"{path}: its length does not fit its {sequences} sequences; preprocess again")
        lengths = np.fromfile(file, dtype="<i4", count=sequences)
        offsets = np.fromfile(file, dtype="<i8", count=sequences)
        starts = np.fromfile(file, dtype="<i8", count=documents)
        modes = np.fromfile(file, dtype="i1", count=sequences)
    return offsets, lengths, modes, starts


def _check_index(
    offsets: np.ndarray, lengths: np.ndarray, modes: np.ndarray, documents: np.ndarray, bin_bytes: int, path: Path
) -> None:
    """Raise DataError unless the sequences fill .bin without gap or overlap and every document has its three modes."""
    misfit = DataError(f"{path}: offsets do not fit the .bin file; preprocess again")
    if len(lengths) and lengths.min() < 0:
        raise DataError(f"{path}: a negative length; preprocess again")
    end = 0
    for first in range(0, len(lengths), _BLOCK):  # what fits a cache is checked three times faster than all at once
        at, words = offsets[first : first + _BLOCK], lengths[first : first + _BLOCK]
        if at[0] != end or not np.array_equal(at[1:] - at[:-1], words[:-1] * np.int64(4)):
            raise misfit
        end = int(at[-1]) + 4 * int(words[-1])
    if end != bin_bytes:
        raise misfit
    if documents[0] != 0 or documents[-1] != len(lengths) or documents.min() < 0 or documents.max() > len(lengths):
        raise DataError(f"{path}: documents do not fit the sequences; preprocess again")
    has_modes = np.count_nonzero(modes == PICTURE) == len(modes) - 2 * (len(documents) - 1)
    for first in range(0, len(documents) - 1, _BLOCK):
        bounds = documents[first : first + _BLOCK + 1]
        if (bounds[1:] - bounds[:-1]).min() < 2:
            raise DataError(f"{path}: documents do not fit the sequences; preprocess again")
        has_modes &= bool((modes[bounds[:-1]] == TEXT).all()) and bool((modes[bounds[1:] - 1] == SPANS).all())
    if not has_modes:
        raise DataError(f"{path}: a document is not text, pictures, target spans; preprocess again")
