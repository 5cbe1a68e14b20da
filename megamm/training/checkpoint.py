"""Checkpoints of a run: weights, optimizer, schedule and data position. Written aside, renamed, loaded at any layout.

A checkpoint `step_XXXXXXXX/` holds megatron's `torch_dist` files with global tensors under canonical names, and beside
them what megamm/weights/directory.py describes, so that every tool reads it as it reads an imported one.
"""

import json
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed.checkpoint.api import CheckpointException

from megamm.errors import CheckpointError
from megamm.models.vlm import VLM
from megamm.weights.directory import CheckpointInfo, checkpoints, copy_side_files, read_info, write_info

RECIPE = "recipe.json"
"""The resolved configuration, as `megamm.train` takes it for a recipe."""

# The default sharding of the optimizer cannot be loaded at another layout, this one can at every.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


@dataclass(frozen=True, kw_only=True, slots=True)
class RunState:
    """What a checkpoint holds of a run; the stages are behind DDP."""

    stages: Sequence[DistributedDataParallel]
    optimizer: MegatronOptimizer
    schedule: OptimizerParamScheduler


def step_dir(run_dir: str | Path, step: int) -> Path:
    """Where the checkpoint behind step `step` lies."""
    return Path(run_dir) / f"step_{step:08d}"


def newest(run_dir: str | Path) -> Path | None:
    """The newest whole checkpoint of a run, or None."""
    found = checkpoints(run_dir)
    return found[-1] if found else None


def save(
    run_dir: str | Path,
    step: int,
    state: RunState,
    *,
    data: dict[str, Any],
    info: CheckpointInfo,
    side_files: Path | None,
    recipe: str,
    keep_last: int,
) -> Path:
    """Write the checkpoint behind `step`; every rank must call it.

    data: the loader's state. side_files: the checkpoint whose kept tensors and tokenizer go along. It is written under
    another name and renamed when it is whole; only then are older ones removed, `keep_last` of them kept (0: all).
    """
    final = step_dir(run_dir, step)
    partial = final.with_name(final.name + ".partial")
    if dist.get_rank() == 0:
        for leftover in Path(run_dir).glob("step_*.partial"):  # of saves that were cut off
            shutil.rmtree(leftover)
        partial.mkdir(parents=True)
    dist.barrier()
    content = {**_sharded(state, is_loading=False), "step": step, "data": data}
    dist_checkpointing.save(content, str(partial))
    if dist.get_rank() == 0:
        if side_files is not None:
            copy_side_files(side_files, partial)
        write_info(partial, info)
        (partial / RECIPE).write_text(recipe)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        if keep_last:
            for old in checkpoints(run_dir)[:-keep_last]:
                shutil.rmtree(old)
    dist.barrier()
    return final


def load(path: Path, state: RunState, info: CheckpointInfo) -> tuple[int, dict[str, Any]]:
    """Load a checkpoint of this run at whatever layout this run has -> (its step, the loader's state)."""
    check_same_model(path, info)
    loaded = _load(_sharded(state, is_loading=True), path)
    for k, stage in enumerate(state.stages):
        cast(VLM, stage.module).load_state_dict(loaded[f"stage{k}"], strict=False)
    configured = [_settings(group) for group in state.optimizer.param_groups]
    state.optimizer.load_state_dict(loaded["optimizer"])
    for group, settings in zip(state.optimizer.param_groups, configured, strict=True):
        # A group without parameters on rank 0 is stored without its count; no step is ever skipped.
        group.update(settings, step=loaded["step"])
    state.schedule.load_state_dict(loaded["schedule"])
    return loaded["step"], loaded["data"]


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """What the configuration of this run says of a group; what the checkpoint says of it must not win."""
    return {key: group[key] for key in ("max_lr", "min_lr", "wd_mult", "betas", "eps") if key in group}


def load_weights(path: Path, stages: Sequence[VLM], info: CheckpointInfo) -> None:
    """Load only the weights, from an imported checkpoint or one of another run, into stages not yet behind DDP."""
    check_same_model(path, info)
    sharded = {f"stage{k}": _weights(stage) for k, stage in enumerate(stages)}
    loaded = _load(sharded, path)
    for k, stage in enumerate(stages):
        stage.load_state_dict(loaded[f"stage{k}"], strict=False)


def _load(sharded: dict[str, Any], path: Path) -> dict[str, Any]:
    try:
        return dist_checkpointing.load(sharded, str(path))
    except (CheckpointingException, CheckpointException, OSError, EOFError, KeyError) as error:
        raise CheckpointError(
            f"{path} cannot be loaded: {error}. Take an older checkpoint, or import it again"
        ) from error


def _weights(stage: VLM) -> dict[str, Any]:
    """Without Transformer Engine's FP8 statistics, which imported checkpoints and those of the CPU do not have. They
    are measured anew within a few steps."""
    return {k: v for k, v in stage.sharded_state_dict().items() if not isinstance(v, ShardedObject)}


def _sharded(state: RunState, *, is_loading: bool) -> dict[str, Any]:
    stages = {f"stage{k}": _weights(cast(VLM, stage.module)) for k, stage in enumerate(state.stages)}
    optimizer = state.optimizer.sharded_state_dict(stages, is_loading=is_loading, metadata=_METADATA)
    return {**stages, "optimizer": optimizer, "schedule": state.schedule.state_dict()}


def check_same_model(path: Path, info: CheckpointInfo) -> None:
    """Raise CheckpointError unless the checkpoint at `path` holds the model that `info` describes."""
    stored = read_info(path)
    if stored.family != info.family:
        raise CheckpointError(f"{path} is a checkpoint of family {stored.family}; this run trains {info.family}")
    theirs, ours = ({**which.hf_config, "vision tower": which.tower_config} for which in (stored, info))
    differ = sorted(key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key))
    if differ:
        raise CheckpointError(
            f"{path} holds a model of other sizes: its config.json differs in {', '.join(differ)}. Give model.config "
            "(or model.pretrained) of the same model, or another checkpoint.dir"
        )


def check_same_frozen(path: Path, freeze: Collection[str]) -> None:
    """Raise CheckpointError unless the checkpoint at `path` was saved with the same parts frozen: its optimizer has
    state for the others only."""
    try:
        stored = json.loads((path / RECIPE).read_text())["train"]["freeze"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path / RECIPE} cannot be read ({error}); take an older checkpoint") from error
    if sorted(stored) != sorted(freeze):
        raise CheckpointError(
            f"{path} was saved with train.freeze={', '.join(stored) or 'nothing'}, this run has "
            f"{', '.join(freeze) or 'nothing'}: start a new run, in another checkpoint.dir, with "
            f"model.pretrained={path}"
        )
