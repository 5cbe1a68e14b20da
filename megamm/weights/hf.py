"""Hugging Face directories: safetensors read and written one tensor at a time, and config.json. Names and bytes only.

Tensors are read with the safetensors library, which checks the header against the file before anything is believed;
they are written here, because the library can only write what is all in memory.
"""

import json
import os
import shutil
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megamm.errors import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""safetensors' names of the dtypes that may be read and written."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What is known of a stored tensor without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorInfo":
        """Shape and dtype of a tensor, a meta tensor included."""
        return cls(tuple(tensor.shape), tensor.dtype)

    def meta(self) -> Tensor:
        """A tensor of this shape and dtype that holds no memory."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    @property
    def num_elements(self) -> int:
        """Product of the shape."""
        return self.meta().numel()

    @property
    def num_bytes(self) -> int:
        """Size of the data."""
        return self.num_elements * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class _Stored:
    path: Path
    name: str
    info: TensorInfo


class HfSource:
    """The tensors of a Hugging Face directory, single file or sharded; each is read when asked for and kept nowhere.

    CheckpointError, naming the file: no weights, a file that the index names and is not there, a truncated or lying
    file, one name in two files, files and index that disagree.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self._stored = _scan(_weight_files(self.directory))

    @classmethod
    def of_file(cls, path: str | Path) -> "HfSource":
        """The tensors of one safetensors file."""
        source = cls.__new__(cls)
        source.directory = Path(path).parent
        source._stored = _scan({Path(path): None})
        return source

    def with_tensors_of(self, other: "HfSource", names: Mapping[str, str]) -> "HfSource":
        """This source and, under the keys of `names`, the tensors of `other` that its values name."""
        joined = HfSource.__new__(HfSource)
        joined.directory = self.directory
        joined._stored = self._stored | {name: other._stored[theirs] for name, theirs in names.items()}
        return joined

    @property
    def infos(self) -> dict[str, TensorInfo]:
        """Shape and dtype of every tensor, by name."""
        return {name: stored.info for name, stored in self._stored.items()}

    def read(self, name: str) -> Tensor:
        """One tensor, in its stored dtype. The file is mapped only as long as the tensor lives."""
        stored = self._stored[name]
        with _opened(stored.path) as file:
            return file.get_tensor(stored.name)


def _weight_files(directory: Path) -> dict[Path, set[str] | None]:
    """Every file of weights with the names the index expects in it; None: there is no index."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory")
    single, index = directory / WEIGHTS, directory / INDEX
    if single.exists() and index.exists():
        raise CheckpointError(f"{directory} holds both {WEIGHTS} and {INDEX}; remove the one that is out of date")
    if single.exists():
        return {single: None}
    if not index.exists():
        raise CheckpointError(f"{directory} holds neither {WEIGHTS} nor {INDEX}: no weights to read")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map")
    files: dict[Path, set[str] | None] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{index} puts {name} into {file!r}, which is not the name of a file beside it")
        expected = files.setdefault(directory / file, set())
        assert expected is not None
        expected.add(name)
    return files


def _scan(files: Mapping[Path, set[str] | None]) -> dict[str, _Stored]:
    stored: dict[str, _Stored] = {}
    for path, expected in sorted(files.items()):
        with _opened(path) as file:
            names = set(file.keys())
            if expected is not None and (absent := sorted(expected - names)):
                raise CheckpointError(f"{path} lacks {absent[0]}, which {INDEX} puts there ({len(absent)} such names)")
            for name in sorted(names):
                if name in stored:
                    raise CheckpointError(f"{name} is both in {stored[name].path} and in {path}; remove one of them")
                if expected is not None and name not in expected:
                    raise CheckpointError(f"{path} holds {name}, which {INDEX} does not put there")
                view = file.get_slice(name)
                if view.get_dtype() not in DTYPES:
                    raise CheckpointError(f"{path}: {name} has dtype {view.get_dtype()}, which torch cannot hold here")
                stored[name] = _Stored(path, name, TensorInfo(tuple(view.get_shape()), DTYPES[view.get_dtype()]))
    return stored


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; fetch the checkpoint again") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path} is no whole safetensors file ({error}); fetch it again") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. CheckpointError: absent, not JSON, not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except ValueError as error:  # JSON and UTF-8 errors both are ValueErrors
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """A JSON object to a file, indented as transformers does."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_config(directory: str | Path) -> dict[str, Any]:
    """The config.json of a Hugging Face directory."""
    return read_json(Path(directory) / CONFIG)


class HfWriter:
    """Writes safetensors of known names, shapes and dtypes, tensors in any order and none kept in memory.

    One file of `filename`, or shards of at most `max_shard_bytes` (None: never) and an index as transformers names
    them. A context manager: leaving it without an error checks that all was written. ValueError: an unexpected tensor.
    """

    def __init__(
        self,
        directory: Path,
        tensors: Mapping[str, TensorInfo],
        *,
        filename: str = WEIGHTS,
        max_shard_bytes: int | None = 5 * 10**9,
    ):
        shards = _shards(tensors, max_shard_bytes)
        stem, suffix = os.path.splitext(filename)
        self._places: dict[str, tuple[Path, int]] = {}
        self._tensors = dict(tensors)
        self._unwritten = set(tensors)
        for number, shard in enumerate(shards, start=1):
            numbered = f"{stem}-{number:05d}-of-{len(shards):05d}{suffix}"
            path = directory / (filename if len(shards) == 1 else numbered)
            self._places |= {name: (path, offset) for name, offset in _create(path, shard).items()}
        if len(shards) > 1:
            total = sum(info.num_bytes for info in tensors.values())
            weight_map = {name: path.name for name, (path, _) in sorted(self._places.items())}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_json(directory / f"{filename}.index.json", index)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor to its place."""
        if name not in self._unwritten:
            raise ValueError(f"{name} was not announced, or is written twice")
        if TensorInfo.of(tensor) != self._tensors[name]:
            raise ValueError(f"{name} is {TensorInfo.of(tensor)} and was announced as {self._tensors[name]}")
        path, offset = self._places[name]
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self._unwritten.remove(name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._unwritten:
            raise ValueError(f"never written: {', '.join(sorted(self._unwritten))}")


def _shards(tensors: Mapping[str, TensorInfo], max_bytes: int | None) -> list[dict[str, TensorInfo]]:
    """In order, as many tensors per shard as fit; a tensor larger than a shard has one of its own."""
    shards: list[dict[str, TensorInfo]] = [{}]
    size = 0
    for name, info in tensors.items():
        if max_bytes is not None and shards[-1] and size + info.num_bytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = info
        size += info.num_bytes
    return shards


def _create(path: Path, tensors: Mapping[str, TensorInfo]) -> dict[str, int]:
    """Write the header and make the file its full size; returns where each tensor's data begins."""
    dtype_names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file that does not say "pt"
    begin = 0
    for name, info in tensors.items():
        end = begin + info.num_bytes
        header[name] = {"dtype": dtype_names[info.dtype], "shape": info.shape, "data_offsets": [begin, end]}
        begin = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # data begins at a multiple of 8 bytes, as the format asks
    start = 8 + len(encoded)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(start + begin)
    return {name: start + header[name]["data_offsets"][0] for name in tensors}


@contextmanager
def new_directory(path: str | Path) -> Iterator[Path]:
    """A directory to fill, renamed to `path` when the block ends well and removed when it does not.

    CheckpointError: `path` exists and is not an empty directory.
    """
    target = Path(path).absolute()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise CheckpointError(f"{path} exists already; remove it or name another output")
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{os.getpid()}.partial")
    aside.mkdir()
    try:
        yield aside
        aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)  # gone already when it was renamed
