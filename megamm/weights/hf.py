"""Hugging Face directories: tensors read and written one at a time, and config.json. Names and bytes only.

safetensors are read with their library, which checks the header against the file before anything is believed, and
PyTorch's files by `load_bin` alone; safetensors are written here, because the library can only write what is all in
memory.
"""

import json
import os
import re
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megamm.errors import CheckpointError

WEIGHTS = "model.safetensors"
BIN = "pytorch_model.bin"
BESIDE = ("mm_projector.bin", "non_lora_trainables.bin")
"""What LLaVA's trainer writes beside or instead of whole weights."""
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
    """As the file has it."""
    info: TensorInfo


class HfSource:
    """The tensors of a Hugging Face directory; each is read when asked for and kept nowhere.

    All of these files together: model.safetensors or its shards, pytorch_model.bin or its shards, `BESIDE`. Shards are
    those of the index, where there is one. Names lose what PEFT puts around them. CheckpointError, naming the file: no
    weights, a file that the index names and is not there, a truncated or lying file, one that holds more than tensors,
    one name in two files, files and index that disagree.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self._stored = _scan(_weight_files(self.directory))

    @classmethod
    def of_file(cls, path: str | Path) -> "HfSource":
        """The tensors of one file."""
        return cls._of(Path(path).parent, _scan({Path(path): None}))

    @classmethod
    def empty(cls) -> "HfSource":
        """No tensors."""
        return cls._of(Path(), {})

    @classmethod
    def _of(cls, directory: Path, stored: dict[str, _Stored]) -> "HfSource":
        source = cls.__new__(cls)
        source.directory = directory
        source._stored = stored
        return source

    def renamed(self, names: Mapping[str, str]) -> "HfSource":
        """The tensors that the values of `names` name, under its keys."""
        return HfSource._of(self.directory, {name: self._stored[theirs] for name, theirs in names.items()})

    def __add__(self, other: "HfSource") -> "HfSource":
        """This source, and what it lacks from `other`."""
        return HfSource._of(self.directory, other._stored | self._stored)

    @property
    def infos(self) -> dict[str, TensorInfo]:
        """Shape and dtype of every tensor, by name."""
        return {name: stored.info for name, stored in self._stored.items()}

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._stored[name].path

    def read(self, name: str) -> Tensor:
        """One tensor, in its stored dtype. The file is mapped only as long as the tensor lives."""
        stored = self._stored[name]
        if stored.path.suffix == ".bin":
            return load_bin(stored.path)[stored.name]
        with _opened(stored.path) as file:
            return file.get_tensor(stored.name)


def has_weights(directory: str | Path) -> bool:
    """Whether a directory holds any file that looks like weights, be it whole or not."""
    return any(path.suffix in (".safetensors", ".bin") for path in Path(directory).iterdir())


def _weight_files(directory: Path) -> dict[Path, set[str] | None]:
    """Every file of weights with the names the index expects in it; None: there is no index."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory")
    files = _shards_of(directory, WEIGHTS) | _shards_of(directory, BIN)
    files |= {directory / name: None for name in BESIDE if (directory / name).exists()}
    if not files:
        raise CheckpointError(f"{directory} holds no weights: neither {WEIGHTS} nor {BIN}, their shards or {BESIDE[0]}")
    return files


def _shards_of(directory: Path, single: str) -> dict[Path, set[str] | None]:
    """The file `single`, or the shards that its index names, or without an index those that are there."""
    stem, suffix = os.path.splitext(single)
    index = directory / f"{single}.index.json"
    if not index.exists():
        shards = sorted(directory.glob(f"{stem}-*-of-*{suffix}"))
        for path in shards:
            if len(shards) != int((re.findall(r"-of-(\d+)$", path.stem) or ["0"])[0]):
                raise CheckpointError(f"{directory} holds {len(shards)} shards like {path.name}; fetch it again")
        return dict.fromkeys([*shards, *directory.glob(single)])
    if (directory / single).exists():
        raise CheckpointError(f"{directory} holds both {single} and {index.name}; remove the one that is out of date")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map")
    files: dict[Path, set[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or Path(file).suffix != suffix:
            raise CheckpointError(f"{index} puts {name} into {file!r}, which is not the name of a file beside it")
        files.setdefault(directory / file, set()).add(name)
    return dict(files)


def _scan(files: Mapping[Path, set[str] | None]) -> dict[str, _Stored]:
    stored: dict[str, _Stored] = {}
    for path, expected in sorted(files.items()):
        infos = _infos(path)
        if expected is not None and (absent := sorted(expected - infos.keys())):
            raise CheckpointError(f"{path} lacks {absent[0]}, which its index puts there ({len(absent)} such names)")
        for theirs, name in _unwrapped(infos).items():
            if name in stored:
                raise CheckpointError(f"{name} is both in {stored[name].path} and in {path}; remove one of them")
            if expected is not None and theirs not in expected:
                raise CheckpointError(f"{path} holds {theirs}, which its index does not put there")
            stored[name] = _Stored(path, theirs, infos[theirs])
    return stored


def _unwrapped(names: Iterable[str]) -> dict[str, str]:
    """Names of a file -> without what PEFT puts around them, by the rule of LLaVA's own loader."""
    plain = {name: name.removeprefix("base_model.").replace(".base_layer.", ".") for name in sorted(names)}
    if any(name.startswith("model.model.") for name in plain.values()):
        return {name: short.removeprefix("model.") for name, short in plain.items()}
    return plain


def _infos(path: Path) -> dict[str, TensorInfo]:
    """Shape and dtype of every tensor of a file, by name."""
    if path.suffix == ".bin":
        return {name: TensorInfo.of(tensor) for name, tensor in load_bin(path).items()}
    infos = {}
    with _opened(path) as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            view = file.get_slice(name)
            if view.get_dtype() not in DTYPES:
                raise CheckpointError(f"{path}: {name} has dtype {view.get_dtype()}, which torch cannot hold here")
            infos[name] = TensorInfo(tuple(view.get_shape()), DTYPES[view.get_dtype()])
    return infos


def load_bin(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that `torch.save` wrote, mapped and not yet read. Nothing is unpickled but tensors.

    CheckpointError: anything else in it, above all code to run; a file that is not whole, or older than torch 1.6.
    """
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; fetch the checkpoint again") from error
    except UnpicklingError as error:
        raise CheckpointError(
            f"{path} is refused: it holds more than tensors, and to load that could run any code. Get the weights "
            "elsewhere, as safetensors"
        ) from error
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, EOFError) as error:
        # What a broken archive or pickle raises is not documented.
        reason = str(error).partition(". ")[0]
        raise CheckpointError(
            f"{path} is no whole PyTorch file of torch 1.6 or newer ({reason}); fetch it again"
        ) from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}, not tensors by name")
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(f"{path} holds {name!r}, a {type(tensor).__name__}, where only tensors belong")
        if tensor.layout != torch.strided or tensor.dtype not in DTYPES.values():
            raise CheckpointError(f"{path}: {name} is {tensor.layout} of {tensor.dtype}, which is not supported")
        if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
            raise CheckpointError(f"{path}: {name} {tuple(tensor.shape)} is larger than the data stored for it")
    return {name: tensor.detach() for name, tensor in loaded.items()}


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
        raise CheckpointError(f"{path} is missing; give the directory of a Hugging Face checkpoint") from error
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
    them. A context manager: leaving it without an error checks that all was written. ValueError: an unexpected
    tensor, or at the end one that was never written.
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
