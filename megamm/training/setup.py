"""From a configuration to everything a run needs before any process group exists: model, layout, sizes, costs.

What is wrong is found here, all of it at once, in seconds and without weights: the dry run is this file and a table.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megamm.config.schema import Config, Data
from megamm.data.image import ImageFormat
from megamm.data.indexed import Reader
from megamm.errors import CheckpointError, ConfigError, MegammError
from megamm.models.build import units
from megamm.models.family import Family
from megamm.models.options import VlmOptions
from megamm.models.spec import Build
from megamm.parallel.check import Sizes, find_size_problems
from megamm.parallel.placement import Layout, Unit, auto_layout, parse_layout, step_flops
from megamm.registry import family
from megamm.weights.convert import INFO, CheckpointInfo, find_checkpoint, read_info


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A run, planned."""

    family: Family
    options: VlmOptions
    info: CheckpointInfo
    """What a checkpoint of this run will say it is."""
    start: Path | None
    """The checkpoint to start from; None: weights are drawn."""
    units: list[Unit]
    """The flat list, with the cost of a mean micro-batch."""
    layout: Layout
    dp: int
    num_samples: int | None
    """Samples of the dataset; None where it is absent (a dry run)."""
    num_steps: int
    """Optimizer steps; 0 where neither `train.steps` nor a dataset says (a dry run)."""

    def build(self, config: Config) -> Build:
        """How the modules are built."""
        return Build(
            tp=config.parallel.tp,
            sequence_parallel=config.parallel.sequence_parallel,
            layout=self.layout,
            precision=config.train.precision,
            recompute=config.train.recompute,
        )

    def flops(self, config: Config, num_tokens: float, num_images: float, seq_length: float) -> float:
        """FLOPs of the model for so many tokens and images, forward and backward, without recomputation."""
        flat = units(self.options, num_tokens=num_tokens, num_images=num_images, seq_length=seq_length)
        return sum(step_flops(flat, config.train.freeze))


def plan(config: Config, world_size: int, needs_data: bool = True) -> Plan:
    """Plan a run on `world_size` ranks. Raises ConfigError with every problem, CheckpointError or DataError for files.

    needs_data: whether a missing dataset is an error; a dry run plans without one.
    """
    of_family = family(config.model.family)
    info, start = _read_info(config, of_family)
    options = of_family.read(info.hf_config, info.tower_config)
    reader = Reader(config.data.path) if needs_data or _exists(config.data.path) else None
    tokens, images = _mean_sample(options, config.data, reader)
    micro_batch = config.train.micro_batch
    flat = units(
        options,
        num_tokens=tokens * micro_batch,
        num_images=images * micro_batch,
        seq_length=tokens,
        bytes_per_value=4 if config.train.precision == "fp32" else 2,
    )
    problems = find_size_problems(config.parallel, part_sizes(options), flat)
    if config.data.max_tokens > options.llm.max_positions:
        problems.append(
            f"data.max_tokens={config.data.max_tokens}: the llm was made for {options.llm.max_positions} positions; "
            "give at most that"
        )
    if reader is not None and reader.info.get("family") != config.model.family:
        problems.append(
            f"data.path={config.data.path} was preprocessed for family {reader.info.get('family')}, "
            f"model.family is {config.model.family}; preprocess it again with --family {config.model.family}"
        )
    if problems:
        raise ConfigError(problems)
    num_samples = len(reader) if reader is not None else None
    by_epochs = math.ceil(config.train.epochs * (num_samples or 0) / config.train.global_batch)
    return Plan(
        family=of_family,
        options=options,
        info=info,
        start=start,
        units=flat,
        layout=choose_layout(config, flat),
        dp=world_size // (config.parallel.tp * config.parallel.pp),
        num_samples=num_samples,
        num_steps=config.train.steps or by_epochs,
    )


def choose_layout(config: Config, flat: Sequence[Unit]) -> Layout:
    """The cut that `parallel.layout` names, or the balanced one."""
    parallel = config.parallel
    if parallel.layout == "auto":
        return auto_layout(flat, parallel.pp, frozen=config.train.freeze, recompute=config.train.recompute == "full")
    return parse_layout(parallel.layout, flat, parallel.pp)


def part_sizes(options: VlmOptions) -> dict[str, Sizes]:
    """The sizes that tensor parallelism divides."""
    vision, llm = options.vision, options.llm
    return {
        "vision": Sizes(heads=vision.num_heads, groups=vision.num_heads, ffn=vision.ffn_size),
        "llm": Sizes(heads=llm.num_heads, groups=llm.num_groups, ffn=llm.ffn_size, vocab=llm.padded_vocab_size),
    }


def image_format(options: VlmOptions, data: Data) -> ImageFormat:
    """How pictures are prepared for this model."""
    return ImageFormat(
        size=options.vision.image_size,
        mean=options.image.mean,
        std=options.image.std,
        aspect=data.aspect,
        resize=options.image.resize,
        tokens=options.tokens_per_image,
    )


def _read_info(config: Config, of_family: Family) -> tuple[CheckpointInfo, Path | None]:
    """What the model is, from `model.pretrained` where it is, else from `model.config`."""
    model = config.model
    if model.pretrained is not None and Path(model.pretrained).exists():
        start = find_checkpoint(model.pretrained)
        info = read_info(start)
        if info.family != model.family:
            raise CheckpointError(
                f"model.pretrained={start} is of family {info.family}, model.family is {model.family}"
            )
        return info, start
    if model.config is None:
        missing = f"model.pretrained={model.pretrained} does not exist" if model.pretrained else "neither is given"
        raise ConfigError(
            [
                f"model: {missing}; give model.pretrained, a checkpoint that tools/checkpoint/hf_to_megatron.py made, or "
                "model.config, a config.json whose sizes are taken and whose weights are drawn"
            ]
        )
    return CheckpointInfo(
        family=model.family, dialect=of_family.export_dialect, hf_config=_config_json(model.config)
    ), None


def _config_json(path: str) -> dict[str, Any]:
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError([f"model.config={path} is not a readable config.json: {error}"]) from error


def _exists(prefix: str) -> bool:
    return Path(f"{prefix}.json").exists()


def _mean_sample(options: VlmOptions, data: Data, reader: Reader | None) -> tuple[float, float]:
    """Mean tokens, after the cut, and mean images of a sample; without data a full sequence with one picture."""
    if reader is None or not len(reader):
        return float(data.max_tokens), 1.0
    tokens = reader.num_ids + reader.num_images * (options.tokens_per_image - 1)
    return float(np.minimum(tokens, data.max_tokens).mean()), float(reader.num_images.mean())


def must_start_from_weights(config: Config, found: Plan) -> None:
    """A run whose `model.pretrained` is missing must not silently draw its weights. Raises MegammError."""
    if config.model.pretrained is not None and found.start is None:
        raise MegammError(
            f"model.pretrained={config.model.pretrained} has no {INFO}: it is not there. Make it with "
            "tools/checkpoint/hf_to_megatron.py, or drop it (--model.pretrained None) to draw the weights"
        )
