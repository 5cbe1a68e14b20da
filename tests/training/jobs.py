"""What the ranks of the training tests run."""

import dataclasses
import json
import shutil
from pathlib import Path

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

from megamm import backend
from megamm.batch import Batch
from megamm.config.schema import Config
from megamm.data.loader import collate, collate_packed
from megamm.models.build import build_stages
from megamm.models.parameters import canonical_parameters, draw, freeze
from megamm.models.vlm import VLM
from megamm.parallel import groups
from megamm.training import checkpoint, loop
from megamm.training.loop import run
from megamm.training.meter import LOG
from megamm.training.optim import wrap
from megamm.training.setup import plan
from megamm.training.step import mean_loss, run_pipeline


def train(config: Config) -> list[dict]:
    """A whole run as megamm.train does it -> the lines of its log, on every rank."""
    found = plan(config, groups.world_size())
    backend.start("cpu")
    groups.start_distributed()
    run(config, found, groups.start(config.parallel, found.layout, config.train.seed))
    return [json.loads(line) for line in (Path(config.checkpoint.dir) / LOG).read_text().splitlines()]


def train_until(config: Config, step: int) -> None:
    """A run that ended behind the checkpoint of `step`: train, then drop what came later."""
    train(config)
    if groups.is_first():
        drop_after(Path(config.checkpoint.dir), step)


def drop_after(directory: Path, step: int) -> None:
    """Remove the checkpoints of later steps."""
    for path in directory.glob("step_*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)


def train_in_buckets(config: Config) -> tuple[list[dict], int]:
    """A run whose gradients are reduced in several overlapped buckets -> (its log, most buckets on this rank)."""
    chosen = backend.start("cpu")
    counts = []

    def wrap_and_count(stages: list) -> list:
        wrapped = wrap(stages)
        counts.extend(len(buffer.buckets) for stage in wrapped for buffer in stage.buffers)
        return wrapped

    loop.wrap = wrap_and_count
    backend._current = dataclasses.replace(chosen, overlap_gradient_reduction=True, gradient_bucket_size=20_000)
    try:
        return train(config), max(counts)
    finally:
        backend._current, loop.wrap = chosen, wrap


def backward_messages(config: Config) -> list[int]:
    """A run -> the elements of every tensor that this rank sent back to the stage before it."""
    sent: list[int] = []
    communicate = P2PCommunicator._communicate

    def recording(self: P2PCommunicator, *, tensor_send_prev: torch.Tensor | None, **kwargs: object) -> object:
        if tensor_send_prev is not None:
            sent.append(tensor_send_prev.numel())
        return communicate(self, tensor_send_prev=tensor_send_prev, **kwargs)

    P2PCommunicator._communicate = recording
    try:
        train(config)
    finally:
        P2PCommunicator._communicate = communicate
    return sent


def start(config: Config) -> tuple[list[VLM], list[Batch]]:
    """A drawn model -> its stages on this rank, nothing frozen, and the micro-batches of its first step."""
    found = plan(config, groups.world_size())
    backend.start("cpu")
    groups.start_distributed()
    ranks = groups.start(config.parallel, found.layout, config.train.seed)
    table = found.family.keys[found.info.dialect](found.options)
    stages = build_stages(found.options, found.build(config), table)
    draw(stages, table, config.train.seed)
    return stages, next(iter(loop.train_loader(config, found, ranks)))


def gradients(config: Config) -> dict[str, torch.Tensor | None]:
    """One micro-batch of a run without tensor parallelism -> the gradient of every parameter of this rank; None: it is
    not trained."""
    stages, batches = start(config)
    freeze(stages, config.train.freeze)
    wrapped = wrap(stages, distributed_optimizer=False)
    for stage in wrapped:
        stage.zero_grad_buffer()
    run_pipeline(wrapped, batches[:1])
    return {name: getattr(p, "main_grad", None) for name, p in canonical_parameters(stages)}


def packed_and_apart(config: Config, groups_of: list[list[int]]) -> tuple[list[float], dict[str, list[float]]]:
    """Loss and gradients of the same samples, each list of them in one row and in rows of their own, without an
    optimizer between -> both losses, packed first, and for each parameter of this rank the norms of its gradient
    and of the difference."""
    found = plan(config, groups.world_size())
    backend.start("cpu")
    groups.start_distributed()
    ranks = groups.start(config.parallel, found.layout, config.train.seed)
    table = found.family.keys[found.info.dialect](found.options)
    stages = build_stages(found.options, found.build(config), table)
    checkpoint.load_weights(found.start, stages, found.info)
    wrapped = wrap(stages, distributed_optimizer=False)
    dataset = loop.train_loader(config, found, ranks).dataset
    losses, gradients = [], []
    for put_together in (collate_packed, collate):
        for stage in wrapped:
            stage.zero_grad_buffer()
        batches = [
            put_together(
                [dataset[i] for i in numbers],
                pad_id=0,
                pad_multiple=config.parallel.tp,
                tokens_per_image=found.options.tokens_per_image,
                with_pixels=dataset.with_pixels,
                image_size=found.options.vision.image_size,
            )
            for numbers in groups_of
        ]
        losses.append(mean_loss(run_pipeline(wrapped, batches))[0])
        gradients.append({name: p.main_grad.clone() for name, p in canonical_parameters(stages)})
    packed, apart = gradients
    norms = {name: [x.norm().item() for x in (g, packed[name] - g)] for name, g in apart.items()}
    return losses, norms


def repeat(config: Config, times: int) -> list[tuple[float, float]]:
    """The same forward and backward pass again and again -> loss and sum of absolute gradients of each."""
    stages, batches = start(config)
    wrapped = wrap(stages, distributed_optimizer=False)
    results = []
    for _ in range(times):
        for stage in wrapped:
            stage.zero_grad_buffer()
        loss, _ = mean_loss(run_pipeline(wrapped, batches))
        grads = sum(p.main_grad.double().abs().sum().item() for stage in wrapped for p in stage.parameters())
        results.append((loss, grads))
    return results
