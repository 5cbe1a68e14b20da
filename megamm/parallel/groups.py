"""Process groups: from a `Parallel` and the ranks that torchrun started to megatron-core's groups and their names."""

import os
import threading
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megamm import backend
from megamm.config.schema import Parallel
from megamm.errors import ConfigError
from megamm.parallel.placement import Layout


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """Where this process stands on each axis."""

    world: int
    rank: int
    tp: int
    tp_rank: int
    pp: int
    pp_rank: int
    dp: int
    dp_rank: int


def local_rank() -> int:
    """This process's number on its node, as torchrun gives it; 0 without torchrun."""
    return int(os.environ.get("LOCAL_RANK", 0))


def world_size() -> int:
    """Number of processes that torchrun started; 1 without torchrun. Known before any process group exists."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_first() -> bool:
    """Whether this process is the one that speaks for the run; known before any process group exists."""
    return os.environ.get("RANK", "0") == "0"


def end_with_torchrun() -> None:
    """From now on, end this process within a second of the torchrun that started it. Without torchrun nothing happens.

    A torchrun that is ended by kill -9 tells its ranks nothing. They would train on, and write into the checkpoints of
    the run that is started in their place.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_end_without, args=(os.getppid(),), daemon=True).start()


def _end_without(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def start_distributed(timeout_s: float = 1800.0) -> None:
    """Join the default process group, once. Without torchrun's environment this process is a world of one."""
    if dist.is_initialized():
        return
    collectives = backend.current().collectives
    if "RANK" in os.environ:
        dist.init_process_group(collectives, timeout=timedelta(seconds=timeout_s))
    else:
        dist.init_process_group(collectives, store=dist.HashStore(), rank=0, world_size=1)


def start(parallel: Parallel, layout: Layout, seed: int = 0) -> Ranks:
    """Build the model parallel groups of this layout; groups of an earlier layout in this process are dropped.

    Needs `start_distributed`. Raises ConfigError when tp * pp does not divide the world.
    """
    world = dist.get_world_size()
    if world % (parallel.tp * parallel.pp):
        raise ConfigError(
            [
                f"{world} processes cannot be divided by parallel.tp {parallel.tp} x parallel.pp {parallel.pp}: "
                "start a multiple of that many (--nproc-per-node)"
            ]
        )
    _drop_groups()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        create_gloo_process_groups=False,
        virtual_pipeline_model_parallel_size=layout.virtual if layout.virtual > 1 else None,
        # Where a tied embedding has its copies; megatron-core would take the first and the last stage.
        get_embedding_ranks=lambda pp_ranks, *_: [pp_ranks[k] for k in _embedding_ranks(layout)],
        get_position_embedding_ranks=lambda pp_ranks, *_: [pp_ranks[0]],
    )
    backend.seed_ranks(seed)
    return Ranks(
        world=world,
        rank=dist.get_rank(),
        tp=parallel.tp,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp=parallel.pp,
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        dp=parallel_state.get_data_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
    )


def _drop_groups() -> None:
    """Forget the groups of an earlier layout and free them: megatron-core only forgets, and the threads of every gloo
    group wake up a hundred times a second for ever."""
    for group in parallel_state._global_process_group_list or []:
        if group is not None:
            dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()


def _embedding_ranks(layout: Layout) -> list[int]:
    """Pipeline ranks that hold llm.embed or llm.head, in order."""
    return sorted({layout.find(name).pp_rank for name in ("llm.embed", "llm.head")})


def stop() -> None:
    """Leave all groups; call at the end of `main`, so that no rank waits for one that is gone."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def gather_over_tp(x: torch.Tensor) -> list[torch.Tensor]:
    """The slices of all tensor parallel ranks, in rank order; every slice has the shape of `x`."""
    group = parallel_state.get_tensor_model_parallel_group()
    slices = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(slices, x.contiguous(), group=group)
    return slices
