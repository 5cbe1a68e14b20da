"""From a configuration to everything a run needs before any process group exists: model, layout, sizes, costs.

What is wrong is found here, all of it at once, in seconds and without weights: the dry run is this file and a table.
"""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from megamm.config.check import find_problems
from megamm.config.frozen import TEXT_WAY, num_frozen_layers
from megamm.config.schema import PARTS, Checkpoint, Config, Data, Loss
from megamm.data.blend import Blend, members, num_tokens, open_reader
from megamm.data.image import ImageFormat
from megamm.data.indexed import Reader
from megamm.data.packing import Packs, find_packs
from megamm.data.packing import Sizes as PackSizes
from megamm.data.tokenizer_files import tokenizer_hash
from megamm.errors import CheckpointError, ConfigError, MegammError
from megamm.log import get_logger
from megamm.models.build import units
from megamm.models.family import Family
from megamm.models.options import VlmOptions
from megamm.models.spec import Build
from megamm.parallel.check import Sizes, find_size_problems
from megamm.parallel.placement import Layout, Unit, choose_layout, step_flops
from megamm.registry import family
from megamm.training.checkpoint import check_same_frozen, check_same_model, newest
from megamm.weights.directory import HF_FILES, CheckpointInfo, find_checkpoint, read_info

log = get_logger(__name__)


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
    packs: Packs | None
    """The samples of each sequence, with `data.packing`; else every sample is a sequence."""
    samples_per_sequence: float
    """Their mean number."""
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
            loss=config.loss,
        )

    def flops(self, config: Config, num_tokens: float, num_images: float, seq_length: float) -> float:
        """FLOPs of the model for so many tokens and images, forward and backward, without recomputation."""
        flat = units(self.options, num_tokens=num_tokens, num_images=num_images, seq_length=seq_length)
        return sum(step_flops(flat, config.train.freeze))


def plan(config: Config, world_size: int, needs_files: bool = True) -> Plan:
    """Plan a run on `world_size` ranks. Raises ConfigError with everything that keeps it from running.

    needs_files: whether a missing dataset or start, or a directory that cannot be written, is an error; a dry run plans
    without them.
    """
    of_config = find_problems(config, world_size)
    problems = list(of_config)
    model: _Model | None = None
    with _noted(problems):
        model = _read_model(config)
    readers: dict[str, Reader | Blend] = {}
    for name, path in (("data.path", config.data.path), ("data.eval_path", config.data.eval_path)):
        if path and (needs_files or Path(f"{path}.json").exists()):
            with _noted(problems, f"{name}: "):
                readers[name] = open_reader(path)
    problems += _start_problems(config, needs_files, has_model=model is not None)
    if model is None:
        raise ConfigError(problems)

    of_sizes = _size_problems(config, model.options)
    problems += of_sizes
    if not of_config and not of_sizes:
        problems += _interleaving_problems(
            config, choose_layout(config.parallel, _names_only(model.options)), world_size
        )
    problems += _part_problems(config, model.options)
    problems += _length_problems(config, model.options)
    for name, reader in readers.items():
        if not len(reader):
            problems.append(f"{name}={reader.prefix} holds no sample; give another {name}")
        for member in members(reader):
            problems += _data_problems(name, member, model)
    resumed = newest(config.checkpoint.dir)
    if resumed is not None and config.checkpoint.resume:
        with _noted(problems, "checkpoint.dir: "):
            check_same_model(resumed, model.info)
            check_same_frozen(resumed, config.train.freeze)
    data = readers.get("data.path")
    packs: Packs | None = None
    if config.data.packing and data is not None and not problems:
        with _noted(problems, "data.packing: "):
            packs = _packs(config, model.options, data)
    if problems:
        raise ConfigError(problems)
    return _planned(config, model, data, packs, dp=world_size // (config.parallel.tp * config.parallel.pp))


def _planned(config: Config, model: "_Model", data: Reader | Blend | None, packs: Packs | None, dp: int) -> Plan:
    """The plan of a run that nothing keeps from running."""
    options, train = model.options, config.train
    sample_tokens, images = _mean_sample(options, config.data, data)
    per_sequence = 1.0
    if packs is not None:
        per_sequence = len(packs.samples) / len(packs)
    elif config.data.packing:  # no data, in a dry run: one full sample
        per_sequence = config.data.max_tokens / sample_tokens
    flat = units(
        options,
        num_tokens=sample_tokens * per_sequence * train.micro_batch,
        num_images=images * per_sequence * train.micro_batch,
        seq_length=sample_tokens,
        bytes_per_value=4 if train.precision == "fp32" else 2,
    )
    num_samples = None if data is None else len(data)
    num_sequences = num_samples if packs is None else len(packs)
    return Plan(
        family=model.family,
        options=options,
        info=model.info,
        start=model.start,
        units=flat,
        layout=choose_layout(config.parallel, flat, frozen=train.freeze, recompute=train.recompute == "full"),
        dp=dp,
        num_samples=num_samples,
        packs=packs,
        samples_per_sequence=per_sequence,
        num_steps=train.steps or math.ceil(train.epochs * (num_sequences or 0) / train.global_batch),
    )


def _names_only(options: VlmOptions) -> list[Unit]:
    """The flat list where costs do not matter."""
    return units(options, num_tokens=1, num_images=1, seq_length=1)


def _start_problems(config: Config, needs_files: bool, has_model: bool) -> list[str]:
    """Whether there is something to start from, and a directory to write to."""
    problems = _run_dir_problems(config.checkpoint) if needs_files else []
    pretrained = config.model.pretrained
    resumed = newest(config.checkpoint.dir)
    goes_on = resumed is not None and config.checkpoint.resume
    if resumed is not None and not config.checkpoint.resume and needs_files:
        problems.append(
            f"checkpoint.dir={config.checkpoint.dir} holds {resumed.name} of an earlier run, and checkpoint.resume is "
            "False: choose another checkpoint.dir, or remove that run"
        )
    if pretrained is not None and not Path(pretrained).exists() and not goes_on and (needs_files or not has_model):
        problems.append(
            f"model.pretrained={pretrained}: there is no such checkpoint. Make it with tools/checkpoint/"
            "hf_to_megatron.py, or drop it (--model.pretrained None) and give model.config to draw the weights"
        )
    return problems


def _size_problems(config: Config, options: VlmOptions) -> list[str]:
    """Whether the model's sizes can be divided so."""
    if min(config.parallel.tp, config.parallel.pp, config.parallel.virtual_stages) < 1:
        return []  # which is a problem of its own
    return find_size_problems(config.parallel, part_sizes(options), _names_only(options))


def _length_problems(config: Config, options: VlmOptions) -> list[str]:
    """Whether the model has as many positions as a sample may get; packed, a sample gets no more than it has."""
    longest = options.max_sample_tokens
    if config.data.max_tokens <= longest or config.data.packing:
        return []
    return [f"data.max_tokens={config.data.max_tokens}: the model was made for {longest} positions; give at most that"]


def _part_problems(config: Config, options: VlmOptions) -> list[str]:
    """Whether what is frozen and minimised is something that the model has."""
    family, freeze = options.family, config.train.freeze
    problems = []
    if strangers := [part for part in freeze if part in PARTS and part not in options.parts]:
        problems.append(
            f"train.freeze={', '.join(strangers)}: family {family} has none; its parts are {', '.join(options.parts)}"
        )
    if set(options.parts) <= set(freeze):
        problems.append(f"train.freeze={', '.join(freeze)} leaves nothing to train; leave out one of them")
    for part, layers in (("vision", options.vision.num_layers), ("llm", options.llm.num_layers)):
        if (first := num_frozen_layers(part, freeze)) > layers:
            problems.append(f"train.freeze={part}[:{first}]: the {part} has {layers} layers; give at most {layers}")
    if TEXT_WAY in freeze and not options.llm.is_modality_adaptive and options.llm.hyper is None:
        problems.append(f"train.freeze={TEXT_WAY}: this llm has no weights for visual tokens only; give llm instead")
    if not options.has_visual_words and config.loss != Loss():
        changed = [f.name for f in fields(Loss) if getattr(config.loss, f.name) != getattr(Loss(), f.name)]
        problems.append(
            f"loss.{', loss.'.join(changed)}: family {family} has no visual words, so there is one term only; leave "
            "these out"
        )
    return problems


def _interleaving_problems(config: Config, layout: Layout, world_size: int) -> list[str]:
    """Virtual stages pass micro-batches on in groups of pp."""
    parallel, train = config.parallel, config.train
    at_once = train.micro_batch * (world_size // (parallel.tp * parallel.pp))
    if layout.virtual == 1 or train.global_batch // at_once % parallel.pp == 0:
        return []
    return [
        f"train.global_batch={train.global_batch} makes {train.global_batch // at_once} micro-batches per replica; "
        f"{layout.virtual} virtual stages need a multiple of parallel.pp={parallel.pp} of them: legal is a multiple of "
        f"{at_once * parallel.pp}"
    ]


def part_sizes(options: VlmOptions) -> dict[str, Sizes]:
    """The sizes that tensor parallelism divides."""
    vision, projector, llm = options.vision, options.projector, options.llm
    return {
        "vision": Sizes(heads=vision.num_heads, groups=vision.num_heads, ffn=vision.ffn_size),
        "projector": Sizes(heads=projector.num_heads or None, ffn=projector.ffn_size or None),
        "llm": Sizes(heads=llm.num_heads, groups=llm.num_groups, ffn=llm.ffn_size, vocab=llm.padded_vocab_size),
    }


def image_format(options: VlmOptions, data: Data) -> ImageFormat:
    """How pictures are prepared for this model."""
    return ImageFormat(
        size=options.vision.image_size,
        mean=options.image.mean,
        aspect=data.aspect,
        resize=options.image.resize,
        tokens=options.tokens_per_image,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Model:
    """What the model is, from `model.pretrained` where it is, else from `model.config`."""

    family: Family
    info: CheckpointInfo
    options: VlmOptions
    start: Path | None


def _read_model(config: Config) -> _Model | None:
    """None where nothing gives the sizes. Raises MegammError for what cannot be read."""
    model, of_family = config.model, family(config.model.family)
    start = None
    if model.pretrained is not None and Path(model.pretrained).exists():
        start = find_checkpoint(model.pretrained)
        info = read_info(start)
        if info.family != model.family:
            raise CheckpointError(
                f"model.pretrained={start} is of family {info.family}, model.family is {model.family}; give the one "
                "that goes with the other"
            )
    elif config.checkpoint.resume and (resumed := newest(config.checkpoint.dir)) is not None:
        info = read_info(resumed)
    elif model.config is not None:
        info = CheckpointInfo(
            family=model.family, dialect=of_family.export_dialect, hf_config=_config_json(model.config)
        )
    else:
        return None
    return _Model(family=of_family, info=info, options=of_family.read(info.hf_config, info.tower_config), start=start)


def _config_json(path: str) -> dict[str, Any]:
    try:
        config = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError([f"model.config={path} is not a readable config.json: {error}"]) from error
    if not isinstance(config, dict):
        raise ConfigError([f"model.config={path} is not a config.json: it holds no object"])
    return config


@contextmanager
def _noted(problems: list[str], where: str = "") -> Iterator[None]:
    """Add what is wrong in the block to `problems`, and go on behind it."""
    try:
        yield
    except ConfigError as error:
        problems += [where + problem for problem in error.problems]
    except MegammError as error:
        problems.append(f"{where}{error}")


def _data_problems(name: str, reader: Reader, model: _Model) -> list[str]:
    """Whether a dataset was made for this model and with its tokenizer."""
    problems = []
    if reader.info.get("family") != model.info.family:
        problems.append(
            f"{name}={reader.prefix} was preprocessed for family {reader.info.get('family')}, model.family is "
            f"{model.info.family}; preprocess it again with --family {model.info.family}"
        )
    if model.start is not None:
        here = tokenizer_hash(model.start / HF_FILES)
        there = tokenizer.get("hash") if isinstance(tokenizer := reader.info.get("tokenizer"), dict) else None
        if here is None or there is None:
            source = f"{name}={reader.prefix}" if there is None else model.start
            log.info("%s has no tokenizer: not checked that the ids of the data are those of the model", source)
        elif here != there:
            problems.append(
                f"{name}={reader.prefix} was preprocessed with another tokenizer ({there:.12}) than that of "
                f"model.pretrained={model.start} ({here:.12}): its ids mean something else; preprocess it again with "
                f"--tokenizer {model.start / HF_FILES}"
            )
    return problems


def _run_dir_problems(checkpoint: Checkpoint) -> list[str]:
    """Whether the directory of the run can be made or written to; it is not made yet."""
    path = Path(checkpoint.dir).absolute()
    nearest = next(parent for parent in (path, *path.parents) if parent.exists())
    if nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK):
        return []
    return [f"checkpoint.dir={checkpoint.dir} cannot be written: {nearest} is no directory that you may write to"]


def _packs(config: Config, options: VlmOptions, data: Reader | Blend) -> Packs:
    """The samples of each sequence. Raises DataError for packs that do not fit this run."""
    sizes = PackSizes(
        capacity=config.data.max_tokens,
        sample_tokens=options.max_sample_tokens,
        tokens_per_image=options.tokens_per_image,
    )
    return find_packs(data, sizes, seed=config.train.seed if config.data.shuffle else None)


def _mean_sample(options: VlmOptions, data: Data, reader: Reader | Blend | None) -> tuple[float, float]:
    """Mean tokens, after the cut, and mean images of a sample; without data a full sequence with one picture."""
    longest = min(data.max_tokens, options.max_sample_tokens)
    if reader is None or not len(reader):
        return float(longest), 1.0
    tokens = np.minimum(num_tokens(reader, options.tokens_per_image), longest)
    return float(tokens.mean()), float(reader.num_images.mean())
