"""megatron's `torch_dist` format, written and read one tensor at a time, without megatron, ranks or a model.

`megatron.core.dist_checkpointing.load` reads what is written here at every layout, and what it saves at any layout is
read here. Names and bytes only.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from pickle import Unpickler, UnpicklingError
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megamm.errors import CheckpointError
from megamm.weights.hf import (
    DTYPES,
    TensorInfo,
    write_json,
)


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
            with (self._directory / ".metadata").open("rb") as file:
                self._metadata: Metadata = _MetadataUnpickler(file).load()
        except (OSError, EOFError, UnpicklingError) as error:
            raise CheckpointError(
                f"{directory}/.metadata cannot be read ({error}): it is no whole checkpoint"
            ) from error
        self.infos: dict[str, TensorInfo] = {
            name: TensorInfo(tuple(stored.size), stored.properties.dtype)
            for name, stored in self._metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata)
        }

    def read(self, name: str) -> Tensor:
        """One global tensor, in its stored dtype. CheckpointError: a part of it is not there, or cannot be read."""
        stored = self._metadata.state_dict_metadata[name]
        assert isinstance(stored, TensorStorageMetadata)
        if sum(math.prod(chunk.sizes) for chunk in stored.chunks) != self.infos[name].num_elements:
            raise CheckpointError(f"{self._directory} does not hold all of {name}; it is not whole")
        if len(stored.chunks) == 1:  # torch's own load would copy it into a second tensor
            return self._read_chunk(name, stored.chunks[0])
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


class _MetadataUnpickler(Unpickler):
    """Reads `.metadata`, which torch writes as a pickle, and makes nothing but what torch puts there."""

    _LEGAL = {
        "pathlib": {"PosixPath", "WindowsPath"},
        "pathlib._local": {"PosixPath", "WindowsPath"},  # Python 3.13 only
        "torch": {"Size", *(str(dtype).removeprefix("torch.") for dtype in DTYPES.values())},
        "torch.serialization": {"_get_layout"},
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
        "torch.distributed.checkpoint.metadata": {
            "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
            "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
        },
        "torch.distributed.checkpoint.planner": {
            "BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType",
        },
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        """The class of that name, if it is one of those."""
        if name not in self._LEGAL.get(module, ()):
            raise UnpicklingError(f"it holds {module}.{name}, which does not belong there")
        return super().find_class(module, name)


@contextmanager
def _first_failure() -> Iterator[None]:
    """torch wraps what goes wrong in a process into an exception of its own; give back the first one."""
    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error
