"""The loop around the step: build, resume, train, report, evaluate, save."""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megamm import backend
from megamm.batch import Batch
from megamm.config.load import freeze as freeze_config
from megamm.config.schema import Config
from megamm.data.loader import Dataset, Loader
from megamm.data.packing import Packs
from megamm.errors import DataError, MegammError
from megamm.log import get_logger
from megamm.models.build import build_stages
from megamm.models.parameters import draw, freeze
from megamm.parallel.groups import Ranks
from megamm.training import checkpoint
from megamm.training.evaluate import evaluate
from megamm.training.meter import Meter
from megamm.training.optim import build_optimizer, build_schedule, wrap
from megamm.training.setup import Plan, image_format
from megamm.training.step import Stages, train_step

log = get_logger(__name__)


@dataclass(kw_only=True, slots=True)
class _Run:
    """A run between two steps."""

    config: Config
    found: Plan
    ranks: Ranks
    state: checkpoint.RunState
    data: Loader
    step: int
    """Optimizer steps done."""
    side_files: Path | None
    """The checkpoint whose kept tensors and tokenizer go into the next one."""

    def save(self) -> None:
        """Write a checkpoint behind the present step; older ones may go, so the next takes its side files from it."""
        self.side_files = checkpoint.save(
            self.config.checkpoint.dir,
            self.step,
            self.state,
            data=self.data.state_dict(),
            info=self.found.info,
            side_files=self.side_files,
            recipe=freeze_config(self.config),
            keep_last=self.config.checkpoint.keep_last,
        )


def run(config: Config, found: Plan, ranks: Ranks) -> float:
    """Train as planned and return the last loss. Every rank calls it, inside its process groups.

    Raises MegammError when loss or gradients are no longer numbers; the last checkpoint stays.
    """
    now = _prepare(config, found, ranks)
    if now.step >= found.num_steps:
        log.info("nothing to do: %s has all %d steps", now.side_files, found.num_steps)
        return math.nan
    per_step = config.train.global_batch * found.samples_per_sequence
    meter = Meter(
        config.checkpoint.dir,
        found.num_steps,
        lambda tokens, images: found.flops(config, tokens, images, seq_length=tokens / per_step),
        memory_bytes=backend.current().memory_bytes,
        is_writer=ranks.rank == 0,
    )
    meter.start(now.step)
    batches = iter(now.data)
    while now.step < found.num_steps:
        started = time.perf_counter()
        micro_batches = next(batches)
        data_wait_s = time.perf_counter() - started
        lr = max(group["lr"] for group in now.state.optimizer.param_groups)
        result = train_step(now.state.stages, now.state.optimizer, micro_batches)
        now.state.schedule.step(increment=1)
        tokens, images = count(micro_batches)
        backend.current().synchronize()
        step_s = time.perf_counter() - started
        now.step += 1
        if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
            meter.close()
            raise MegammError(
                f"step {now.step}: the loss is {result.loss}, the gradient norm {result.grad_norm}. Lower optim.lr, or "
                f"look at the data of this step; the newest checkpoint is {checkpoint.newest(config.checkpoint.dir)}"
            )
        eval_loss = evaluate_at(config, found, ranks, now.state.stages, now.step)
        meter.step(
            now.step,
            loss=result.loss,
            grad_norm=result.grad_norm,
            **result.terms,
            lr=lr,
            tokens=tokens,
            images=images,
            samples=now.data.samples,
            step_s=step_s,
            data_wait_s=data_wait_s,
            eval_loss=eval_loss,
        )
        every = config.checkpoint.every_steps
        if now.step == found.num_steps or (every and now.step % every == 0):
            now.save()
    meter.close()
    if now.data.truncated:
        log.info("%d samples were longer than %d tokens and cut", now.data.truncated, now.data.dataset.max_tokens)
    return result.loss


def _prepare(config: Config, found: Plan, ranks: Ranks) -> _Run:
    """Build the stages of this rank and fill them: from the newest checkpoint of the run, from `model.pretrained`, or
    drawn, in this order."""
    if found.packs is not None:
        check_same_packs(found.packs)
    table = found.family.keys[found.info.dialect](found.options)
    stages = build_stages(found.options, found.build(config), table)
    resumed = checkpoint.newest(config.checkpoint.dir) if config.checkpoint.resume else None
    if resumed is None and found.start is not None:
        log.info("weights from %s", found.start)
        checkpoint.load_weights(found.start, stages, found.info)
    elif resumed is None:
        log.info("weights drawn from seed %d", config.train.seed)
        draw(stages, table, config.train.seed)
    freeze(stages, config.train.freeze)

    wrapped = wrap(stages)
    optimizer = build_optimizer(config.optim, wrapped)
    schedule = build_schedule(config.optim, optimizer, found.num_steps)
    state = checkpoint.RunState(stages=wrapped, optimizer=optimizer, schedule=schedule)
    data = train_loader(config, found, ranks)
    step = 0
    if resumed is not None:
        step, position = checkpoint.load(resumed, state, found.info)
        data.load_state_dict(position)
        log.info("resumed from %s", resumed)
    return _Run(
        config=config,
        found=found,
        ranks=ranks,
        state=state,
        data=data,
        step=step,
        side_files=resumed or found.start,
    )


def check_same_packs(packs: Packs) -> None:
    """Raise DataError where ranks have other packs. Each looked for itself whether some lie beside the dataset, and on
    a file system that machines share these may be there for one rank and not yet for another."""
    digests: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(digests, packs.digest)
    if len(set(digests)) > 1:
        raise DataError("data.packing: ranks found other packs beside data.path; were these just written? Start again")


def evaluate_at(config: Config, found: Plan, ranks: Ranks, stages: Stages, step: int) -> float | None:
    """The evaluation loss where one is due behind `step`, else None."""
    every = config.train.eval_every_steps
    is_due = step == found.num_steps or (every and step % every == 0)
    if config.data.eval_path is None or not is_due:
        return None
    return evaluate(stages, _loader(config, found, ranks, config.data.eval_path, config.train.eval_samples))


def train_loader(config: Config, found: Plan, ranks: Ranks) -> Loader:
    """The endless loader of the training data for this rank."""
    return _loader(config, found, ranks, config.data.path, None, found.packs)


def _loader(
    config: Config, found: Plan, ranks: Ranks, path: str, num_samples: int | None, packs: Packs | None = None
) -> Loader:
    """num_samples: one pass over so many samples in the stored order; None: endless, in the training order."""
    return Loader(
        Dataset(
            path,
            image_format(found.options, config.data),
            min(config.data.max_tokens, found.options.max_sample_tokens),
            any(stage.has("vision.embed") and stage.pp_rank == ranks.pp_rank for stage in found.layout.stages),
            keeps_images_whole=config.data.packing,
        ),
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
        pin_memory=backend.current().pins_memory,
        num_samples=num_samples,
        packs=packs,
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
