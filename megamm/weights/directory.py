"""A megamm checkpoint directory: finding it, and what lies in it beside the weights.

It is a directory of

- megatron's `torch_dist` files (`.metadata`, `*.distcp`, `metadata.json`, `common.pt`): global tensors under canonical
  names, which `megatron.core.dist_checkpointing.load` reads at every layout. A training checkpoint has optimizer state
  beside them, under names that start with something else than a part of the model;
- `megamm.json`: what this is and what it was imported from (CheckpointInfo);
- `kept.safetensors`: tensors that the release stores and the forward never uses, under their Hugging Face names;
- `hf_files/`: tokenizer and processor files of the release, so that an export can be loaded.
"""

import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megamm.errors import CheckpointError
from megamm.weights.hf import (
    read_json,
    write_json,
)

FORMAT_VERSION = 1
INFO = "megamm.json"
KEPT = "kept.safetensors"
HF_FILES = "hf_files"
TOWER = "vision_tower"
"""Folder of an export in a dialect whose config.json leaves the tower's sizes out: the tower's own config.json."""

_HF_FILE_PATTERNS = (
    "added_tokens*", "chat_template*", "generation_config*", "merges*", "*.model", "*preprocessor_config*",
    "processor_config*", "special_tokens_map*", "tokenizer*", "vocab*",
)  # fmt: skip
_HF_FILE_SUFFIXES = {".jinja", ".json", ".model", ".tiktoken", ".txt"}


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointInfo:
    """What a checkpoint is, as its megamm.json says."""

    family: str
    dialect: str
    """The dialect imported from, in which kept.safetensors is written; the default one of an export."""
    hf_config: dict[str, Any]
    """The config.json imported from, word for word, but for what its family noted of the key names."""
    tower_config: dict[str, Any] | None = None
    """The config.json of the vision tower's own directory, word for word; None: it was not given, or has none."""


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


def checkpoints(run_dir: str | Path) -> list[Path]:
    """The whole checkpoints `step_XXXXXXXX` of a run, oldest first."""
    return sorted(step for step in Path(run_dir).glob("step_" + "[0-9]" * 8) if (step / INFO).exists())


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint directory at `path`, or the newest `step_XXXXXXXX` in the run directory `path`. CheckpointError:
    it is neither."""
    directory = Path(path)
    if (directory / INFO).exists():
        return directory
    steps = checkpoints(directory)
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
    CheckpointError: `source` is not there.
    """
    source, target = Path(source), Path(target)
    if not source.is_dir():
        raise CheckpointError(f"{source} is gone: its kept tensors and tokenizer cannot go into {target}")
    if (source / KEPT).exists():
        try:
            os.link(source / KEPT, target / KEPT)
        except OSError:  # another file system, or one without hard links
            shutil.copyfile(source / KEPT, target / KEPT)
    if (source / HF_FILES).is_dir():
        shutil.copytree(source / HF_FILES, target / HF_FILES, dirs_exist_ok=True)
