"""Hugging Face directory -> megamm checkpoint -> Hugging Face directory, one tensor in memory, no model built.

A megamm checkpoint is a directory of

- megatron's `torch_dist` files (`.metadata`, `*.distcp`, `metadata.json`, `common.pt`): global tensors under canonical
  names, which `megatron.core.dist_checkpointing.load` reads at every layout. A training checkpoint has optimizer state
  beside them, under names that start with something else than a part of the model;
- `megamm.json`: what this is and what it was imported from (CheckpointInfo);
- `kept.safetensors`: tensors that the release stores and the forward never uses, under their Hugging Face names;
- `hf_files/`: tokenizer and processor files of the release, so that an export can be loaded.

Tables come from a family, which is passed in; this file names none.
"""

import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megamm.errors import CheckpointError
from megamm.weights.hf import (
    CONFIG,
    HfSource,
    HfWriter,
    TensorInfo,
    new_directory,
    read_config,
    read_json,
    write_json,
)
from megamm.weights.keymap import Entry, KeyMap, fill, match

FORMAT_VERSION = 1
INFO = "megamm.json"
KEPT = "kept.safetensors"
HF_FILES = "hf_files"

_HF_FILE_PATTERNS = (
    "added_tokens*", "chat_template*", "generation_config*", "merges*", "*.model", "*preprocessor_config*",
    "processor_config*", "special_tokens_map*", "tokenizer*", "vocab*",
)  # fmt: skip
_HF_FILE_SUFFIXES = {".jinja", ".json", ".model", ".tiktoken", ".txt"}


class FamilyTables(Protocol):
    """What conversion needs of a family."""

    @property
    def name(self) -> str: ...
    @property
    def read(self) -> Callable[[dict[str, Any]], Any]: ...
    @property
    def write(self) -> Callable[[Any], dict[str, Any]]: ...
    @property
    def keys(self) -> Mapping[str, Callable[[Any], KeyMap]]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointInfo:
    """What a checkpoint is, as its megamm.json says."""

    family: str
    dialect: str
    """The dialect imported from, in which kept.safetensors is written; the default one of an export."""
    hf_config: dict[str, Any]
    """The config.json imported from, word for word."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HfCheckpoint:
    """An opened Hugging Face checkpoint whose family and dialect are known."""

    family: FamilyTables
    dialect: str
    config: dict[str, Any]
    table: KeyMap
    source: HfSource

    def load(self, name: str) -> Tensor:
        """The global tensor of a canonical name, in its source dtype, vocabulary padded."""
        entry = self.table[name]
        return entry.pack([self.source.read(key) for key in entry.hf])

    def load_slice(self, name: str, tp_rank: int, tp_size: int) -> Tensor:
        """What one tensor parallel rank holds of a canonical name,. CheckpointError: no even cut."""
        return self.table[name].slice(self.load(name), tp_rank, tp_size)


def open_hf(hf_dir: str | Path, tower_dir: str | Path | None, families: Sequence[FamilyTables]) -> HfCheckpoint:
    """Open a Hugging Face directory as the one of `families` whose configuration and key names it has.

    `tower_dir` fills only tensors that `hf_dir` lacks. Nothing is read but names, shapes and dtypes, and every row is
    checked against them. CheckpointError: no family fits, or several do and the user must say which.
    """
    config = read_config(hf_dir)
    source = HfSource(hf_dir)
    tower = HfSource(tower_dir) if tower_dir is not None else None
    found: list[HfCheckpoint] = []
    refusals: dict[str, CheckpointError] = {}
    for family in families:
        try:
            found.append(_open_as(family, config, source, tower))
        except CheckpointError as error:
            refusals[family.name] = error
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(checkpoint.family.name for checkpoint in found)
        raise CheckpointError(f"{hf_dir} fits more than one family: {names}. Say which with --family.")
    if len(refusals) == 1:
        raise next(iter(refusals.values()))
    reasons = "\n".join(f"- {name}: {error}" for name, error in refusals.items())
    raise CheckpointError(f"{hf_dir} is no checkpoint of a family that megamm knows:\n{reasons}")


def _open_as(
    family: FamilyTables, config: dict[str, Any], source: HfSource, tower: HfSource | None
) -> HfCheckpoint:
    options = family.read(config)
    tables = {dialect: make(options) for dialect, make in family.keys.items()}
    tower_names = tower.infos if tower else ()
    dialect = match(source.infos, tables, tower_names)
    table = tables[dialect]
    if tower:
        source = source.with_tensors_of(tower, fill(source.infos, tower_names, table))
    checkpoint = HfCheckpoint(family=family, dialect=dialect, config=config, table=table, source=source)
    _packed_metas(checkpoint)
    return checkpoint


def _packed_metas(checkpoint: HfCheckpoint) -> dict[str, Tensor]:
    """Every canonical tensor without data; refuses shapes and dtypes that do not fit, before anything is read."""
    infos = checkpoint.source.infos
    return {
        entry.name: entry.pack([infos[key].meta() for key in entry.hf]) for entry in checkpoint.table.entries()
    }


def import_hf(
    hf_dir: str | Path, tower_dir: str | Path | None, families: Sequence[FamilyTables], output: str | Path
) -> CheckpointInfo:
    """Write the megamm checkpoint of a Hugging Face directory to `output`, in source dtypes.

    `families` is one, or all that are known and the right one is found (see `open_hf`). Holds at most about twice the
    largest tensor. CheckpointError: anything that does not fit; then `output` is not made.
    """
    checkpoint = open_hf(hf_dir, tower_dir, families)
    infos = checkpoint.source.infos
    kept = {name: infos[name] for name in sorted(checkpoint.table.kept(infos))}
    info = CheckpointInfo(family=checkpoint.family.name, dialect=checkpoint.dialect, hf_config=checkpoint.config)
    with new_directory(output) as directory:
        save_torch_dist(directory, _packed_metas(checkpoint), checkpoint.load)
        with HfWriter(directory, kept, filename=KEPT, max_shard_bytes=None) as writer:
            for name in kept:
                writer.write(name, checkpoint.source.read(name))
        copy_hf_files(hf_dir, directory)
        write_info(directory, info)
    return info


def export_hf(
    checkpoint_dir: str | Path, family: FamilyTables, output: str | Path, dialect: str | None = None
) -> str:
    """Write the Hugging Face directory of a megamm checkpoint to `output`; returns its dialect.

    `dialect` None: the one imported from. Every tensor keeps its stored dtype; a vocabulary loses its padding; kept
    tensors and files come back. Holds at most about twice the largest tensor. CheckpointError: another family, an
    unknown dialect, tensors missing or unknown; then `output` is not made.
    """
    source_dir = find_checkpoint(checkpoint_dir)
    info = read_info(source_dir)
    if info.family != family.name:
        raise CheckpointError(f"{source_dir} is a checkpoint of family {info.family}, not of {family.name}")
    dialect = dialect or info.dialect
    for wanted in (dialect, info.dialect):
        if wanted not in family.keys:
            known = ", ".join(family.keys)
            raise CheckpointError(f"family {family.name} has no dialect {wanted!r}; it has {known}")
    options = family.read(info.hf_config)
    table = family.keys[dialect](options)
    stored = StoredTensors(source_dir)
    _check_complete(table, stored.infos, source_dir)


    infos: dict[str, TensorInfo] = {}
    for entry in table.entries():
        metas = entry.unpack(stored.infos[entry.name].meta())
        infos |= zip(entry.hf, map(TensorInfo.of, metas), strict=True)
    config = info.hf_config if dialect == info.dialect else family.write(options)
    config = _with_dtype(config, {tensor.dtype for tensor in infos.values()})

    kept = HfSource.of_file(source_dir / KEPT) if (source_dir / KEPT).exists() else None
    across = family.keys[info.dialect](options).kept(kept.infos) if kept else {}
    here = table.kept_hf(across.values())
    kept_names = {here[name]: theirs for theirs, name in across.items() if name in here}
    if kept:
        infos |= {name: kept.infos[theirs] for name, theirs in kept_names.items()}
    with new_directory(output) as directory:
        with HfWriter(directory, infos) as writer:
            for entry in table.entries():
                _export_entry(entry, stored, writer)
            if kept:
                for name, theirs in kept_names.items():
                    writer.write(name, kept.read(theirs))
        write_json(directory / CONFIG, config)
        if (source_dir / HF_FILES).is_dir():
            shutil.copytree(source_dir / HF_FILES, directory, dirs_exist_ok=True)
    return dialect


def _check_complete(table: KeyMap, stored: Mapping[str, TensorInfo], source_dir: Path) -> None:
    names = {entry.name for entry in table.entries()}
    if missing := sorted(names - stored.keys()):
        raise CheckpointError(f"{source_dir} lacks {missing[0]} ({len(missing)} such tensors); it is not whole")
    parts = {name.split(".")[0] for name in names}
    if unknown := sorted(name for name in stored.keys() - names if name.split(".")[0] in parts):
        raise CheckpointError(
            f"{source_dir} holds {unknown[0]} ({len(unknown)} such tensors), which its family's table does not have; "
            "an export would lose it"
        )


def _with_dtype(config: dict[str, Any], dtypes: set[torch.dtype]) -> dict[str, Any]:
    """config.json names a dtype in which transformers loads: it must be that of the tensors after a training, too."""
    if len(dtypes) != 1:
        return config
    name = str(next(iter(dtypes))).removeprefix("torch.")
    return config | {key: name for key in ("dtype", "torch_dtype") if key in config}


def _export_entry(entry: Entry, stored: "StoredTensors", writer: HfWriter) -> None:
    """A function of its own so that its tensors are gone before the next one is read."""
    for name, tensor in zip(entry.hf, entry.unpack(stored.read(entry.name)), strict=True):
        writer.write(name, tensor)


# ---- megatron's torch_dist format, streamed ----


def save_torch_dist(directory: Path, metas: Mapping[str, Tensor], load: Callable[[str], Tensor]) -> None:
    """Write global tensors as a checkpoint that `megatron.core.dist_checkpointing.load` reads at every layout.

    `metas` gives names, shapes and dtypes as meta tensors; `load(name)` is called once per tensor, just before it is
    written, in this process alone. megatron's own save would need all tensors, a process group and a built model.
    """
    with _first_failure(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # as is meant here
        state_dict_saver.save(
            dict(metas), storage_writer=_TensorByTensorWriter(directory), planner=_LazyPlanner(load), no_dist=True
        )
    torch.save({}, directory / "common.pt")  # megatron's "common state", which it insists on reading
    write_json(
        directory / "metadata.json",
        {
            "sharded_backend": "torch_dist",
            "sharded_backend_version": 1,
            "common_backend": "torch",
            "common_backend_version": 1,
        },
    )


class _LazyPlanner(DefaultSavePlanner):
    """Plans with meta tensors and gets the data of each only when it is written."""

    def __init__(self, load: Callable[[str], Tensor]):
        super().__init__(flatten_state_dict=False)
        self._load = load

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self._load(write_item.index.fqn)


class _TensorByTensorWriter(FileSystemWriter):
    """Writes each tensor in a call of its own: within one call torch holds a tensor until it has the next one, too."""

    def __init__(self, directory: Path):
        super().__init__(directory, single_file_per_rank=False, thread_count=1)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results: list[WriteResult] = []
        for number, item in enumerate(plan.items):
            place = replace(plan.storage_data, prefix=f"{plan.storage_data.prefix}{number}_")
            results += super().write_data(replace(plan, items=[item], storage_data=place), planner).wait()
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done


class StoredTensors(FileSystemReader):
    """The global tensors of a checkpoint directory, those of an optimizer included, each read when asked for.

    Reads what `save_torch_dist` wrote and what megatron wrote from any layout. CheckpointError: no such checkpoint.
    """

    def __init__(self, directory: str | Path):
        super().__init__(directory)
        self._directory = Path(directory)
        try:
            self._metadata = self.read_metadata()
        except (OSError, EOFError, UnpicklingError) as error:
            raise CheckpointError(f"{directory}/.metadata cannot be read: it is no whole checkpoint") from error
        self.infos: dict[str, TensorInfo] = {
            name: TensorInfo(tuple(stored.size), stored.properties.dtype)
            for name, stored in self._metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata)
        }

    def read(self, name: str) -> Tensor:
        """One global tensor, in its stored dtype."""
        stored = self._metadata.state_dict_metadata[name]
        assert isinstance(stored, TensorStorageMetadata)
        if len(stored.chunks) == 1:  # torch's own load would copy it into a second tensor
            return self._read_chunk(name, stored.chunks[0])
        if sum(math.prod(chunk.sizes) for chunk in stored.chunks) != self.infos[name].num_elements:
            raise CheckpointError(f"{self._directory} does not hold all of {name}; it is not whole")
        tensor = torch.empty(stored.size, dtype=stored.properties.dtype)
        for chunk in stored.chunks:
            place = tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))
            tensor[place] = self._read_chunk(name, chunk)
        return tensor

    def _read_chunk(self, name: str, chunk: ChunkStorageMetadata) -> Tensor:
        place = self._metadata.storage_data[MetadataIndex(name, chunk.offsets)]
        path = self._directory / place.relative_path
        try:
            with path.open("rb") as file:
                return torch.load(self._slice_file(file, place), map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, UnpicklingError) as error:
            raise CheckpointError(f"cannot read {name} from {path} ({error}): the checkpoint is not whole") from error


@contextmanager
def _first_failure() -> Iterator[None]:
    """torch wraps what goes wrong in a process into an exception of its own; give back the first one."""
    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error


# ---- what lies beside the weights ----


def write_info(directory: str | Path, info: CheckpointInfo) -> None:
    """Write a checkpoint's megamm.json."""
    write_json(Path(directory) / INFO, {"format": FORMAT_VERSION, **asdict(info)})


def read_info(directory: str | Path) -> CheckpointInfo:
    """Read a checkpoint's megamm.json. CheckpointError: absent, or of a format that this version does not know."""
    path = Path(directory) / INFO
    if not path.exists():
        raise CheckpointError(f"{directory} is no megamm checkpoint: it has no {INFO}")
    fields = read_json(path)
    version = fields.pop("format", None)
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path} has format {version!r}; this version of megamm reads format {FORMAT_VERSION}")
    try:
        return CheckpointInfo(**fields)
    except TypeError as error:
        raise CheckpointError(f"{path} does not have the fields of a checkpoint: {error}") from error


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint directory at `path`, or the newest `step_XXXXXXXX` in the run directory `path`."""
    directory = Path(path)
    if (directory / INFO).exists():
        return directory
    steps = sorted(step for step in directory.glob("step_" + "[0-9]" * 8) if (step / INFO).exists())
    if not steps:
        raise CheckpointError(f"{path} is neither a megamm checkpoint ({INFO}) nor a run directory with step_XXXXXXXX")
    return steps[-1]


def copy_hf_files(hf_dir: str | Path, checkpoint_dir: str | Path) -> list[str]:
    """Copy tokenizer and processor files, never weights or code, into a checkpoint's hf_files/; returns their names."""
    target = Path(checkpoint_dir) / HF_FILES
    target.mkdir(exist_ok=True)
    files = {path for pattern in _HF_FILE_PATTERNS for path in Path(hf_dir).glob(pattern)}
    chosen = sorted(path for path in files if path.is_file() and path.suffix in _HF_FILE_SUFFIXES)
    for path in chosen:
        shutil.copyfile(path, target / path.name)
    return [path.name for path in chosen]


def copy_side_files(source: str | Path, target: str | Path) -> None:
    """Give checkpoint directory `target` what lies beside the weights of `source`: kept tensors and hf_files/.

    Kept tensors never change, so they are hard-linked where the file system can. megamm.json is `write_info`'s.
    """
    source, target = Path(source), Path(target)
    if (source / KEPT).exists():
        try:
            os.link(source / KEPT, target / KEPT)
        except OSError:  # another file system, or one without hard links
            shutil.copyfile(source / KEPT, target / KEPT)
    if (source / HF_FILES).is_dir():
        shutil.copytree(source / HF_FILES, target / HF_FILES, dirs_exist_ok=True)
