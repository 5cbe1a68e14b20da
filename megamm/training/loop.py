"""The loop around the step: build, resume, train, report, evaluate, save."""

import math
import time

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megamm import backend
from megamm.batch import Batch
from megamm.config.load import freeze as freeze_config
from megamm.config.schema import Config
from megamm.data.loader import Dataset, Loader
from megamm.errors import MegammError
from megamm.log import get_logger
from megamm.models.build import build_stages
from megamm.models.parameters import draw, freeze
from megamm.parallel.groups import Ranks
from megamm.training import checkpoint
from megamm.training.evaluate import evaluate
from megamm.training.meter import Meter
from megamm.training.optim import build_optimizer, build_schedule, wrap
from megamm.training.setup import Plan, image_format
from megamm.training.step import train_step

log = get_logger(__name__)


def run(config: Config, found: Plan, ranks: Ranks) -> float:
    """Train as planned and return the last loss. Every rank calls it, inside its process groups.

    Raises MegammError when the loss is no longer a number; the last checkpoint stays.
    """
    table = found.family.keys[found.info.dialect](found.options)
    stages = build_stages(found.options, found.build(config), table)
    resumed = checkpoint.newest(config.checkpoint.dir) if config.checkpoint.resume else None
    if resumed is None and found.start is not None:
        log.info("weights from %s", found.start)
        checkpoint.load_weights(found.start, stages, found.info)
    elif resumed is None:
        log.info("weights drawn from seed %d", config.train.seed)
        draw(stages, table, config.train.seed)
    freeze(stages, found.layout, config.train.freeze)

    data = train_loader(config, found, ranks)
    num_steps = found.num_steps
    state = checkpoint.RunState(
        stages=(wrapped := wrap(stages)),
        optimizer=(optimizer := build_optimizer(config.optim, wrapped)),
        schedule=(schedule := build_schedule(config.optim, optimizer, num_steps)),
    )
    step = 0
    if resumed is not None:
        step, position = checkpoint.load(resumed, state, found.info)
        data.load_state_dict(position)
        log.info("resumed from %s", resumed)
    if step >= num_steps:
        log.info("nothing to do: %s has all %d steps", resumed, num_steps)
        return math.nan

    def save() -> None:
        checkpoint.save(
            config.checkpoint.dir,
            step,
            state,
            data=data.state_dict(),
            info=found.info,
            side_files=resumed or found.start,
            recipe=freeze_config(config),
            keep_last=config.checkpoint.keep_last,
        )

    samples_per_step = config.train.global_batch
    meter = Meter(
        config.checkpoint.dir,
        num_steps,
        lambda tokens, images: found.flops(config, tokens, images, seq_length=tokens / samples_per_step),
        memory_bytes=backend.current().memory_bytes,
        is_writer=ranks.rank == 0,
    )
    meter.start(step)
    batches = iter(data)
    while step < num_steps:
        started = time.perf_counter()
        micro_batches = next(batches)
        data_wait_s = time.perf_counter() - started
        lr = schedule.get_lr({"max_lr": config.optim.lr, "min_lr": config.optim.min_lr})
        result = train_step(wrapped, optimizer, micro_batches)
        schedule.step(increment=1)
        tokens, images = count(micro_batches)
        backend.current().synchronize()
        step_s = time.perf_counter() - started
        step += 1
        if not math.isfinite(result.loss):
            meter.close()
            raise MegammError(
                f"step {step}: the loss is {result.loss}. Lower optim.lr, or look at the data of this step; the newest "
                f"checkpoint is {checkpoint.newest(config.checkpoint.dir)}"
            )
        meter.step(
            step,
            loss=result.loss,
            grad_norm=result.grad_norm,
            lr=lr,
            tokens=tokens,
            images=images,
            samples=step * samples_per_step,
            step_s=step_s,
            data_wait_s=data_wait_s,
            eval_loss=evaluate_at(config, found, ranks, wrapped, step),
        )
        is_last = step == num_steps
        if is_last or (config.checkpoint.every_steps and step % config.checkpoint.every_steps == 0):
            save()
    meter.close()
    if data.truncated:
        log.info("%d samples were longer than data.max_tokens %d and cut", data.truncated, config.data.max_tokens)
    return result.loss


def evaluate_at(config: Config, found: Plan, ranks: Ranks, stages: list, step: int) -> float | None:
    """The evaluation loss where one is due behind `step`, else None."""
    every = config.train.eval_every_steps
    is_due = step == found.num_steps or (every and step % every == 0)
    if config.data.eval_path is None or not is_due:
        return None
    return evaluate(stages, _loader(config, found, ranks, config.data.eval_path, config.train.eval_samples))


def train_loader(config: Config, found: Plan, ranks: Ranks) -> Loader:
    """The endless loader of the training data for this rank."""
    return _loader(config, found, ranks, config.data.path, None)


def _loader(config: Config, found: Plan, ranks: Ranks, path: str, num_samples: int | None) -> Loader:
    """num_samples: one pass over so many samples in the stored order; None: endless, in the training order."""
    with_pixels = any(stage.has("vision.embed") and stage.pp_rank == ranks.pp_rank for stage in found.layout.stages)
    return Loader(
        Dataset(path, image_format(found.options, config.data), config.data.max_tokens, with_pixels),
        dp_rank=ranks.dp_rank,
        dp_size=ranks.dp,
        micro_batch=config.train.micro_batch,
        global_batch=config.train.global_batch,
        pad_id=0,
        pad_multiple=(config.parallel.tp if config.parallel.sequence_parallel else 1)
        * (16 if config.train.precision == "fp8" else 1),
        seed=config.train.seed,
        shuffle=config.data.shuffle and num_samples is None,
        group_by_modality_length=config.data.group_by_modality_length,
        num_workers=config.data.num_workers if num_samples is None else 0,
        num_samples=num_samples,
    )


def count(batches: list[Batch]) -> tuple[int, int]:
    """Tokens and images of the whole global batch."""
    here = torch.tensor(
        [sum(batch.num_tokens for batch in batches), sum(batch.num_images for batch in batches)],
        device=backend.current().device,
    )
    dist.all_reduce(here, group=parallel_state.get_data_parallel_group())
    tokens, images = here.tolist()
    return tokens, images
