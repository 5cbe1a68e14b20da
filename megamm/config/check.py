"""Checks of a configuration, those that need two fields or more included; all problems are found at once.

What depends on a model's sizes is in megamm/parallel/check.py; what depends on the machine, in the backend.
"""

from collections.abc import Callable
from math import inf
from operator import attrgetter

from megamm.config.frozen import LEGAL, is_legal
from megamm.config.schema import Config

_Limit = tuple[Callable[[float], bool], str]

_COUNT: _Limit = (lambda value: value >= 1, "1 or more")
_COUNT_OR_NONE: _Limit = (lambda value: value >= 0, "0 or more")
_POSITIVE: _Limit = (lambda value: 0 < value < inf, "above 0")
_NOT_NEGATIVE: _Limit = (lambda value: 0 <= value < inf, "0 or above")
_SHARE: _Limit = (lambda value: 0 <= value < 1, "at least 0 and below 1")

_LIMITS: dict[str, _Limit] = {
    "data.max_tokens": (lambda value: value >= 2, "2 or more: one token to read and one to predict"),
    "data.num_workers": _COUNT_OR_NONE,
    "parallel.tp": _COUNT,
    "parallel.pp": _COUNT,
    "parallel.virtual_stages": _COUNT,
    "optim.lr": _POSITIVE,
    "optim.min_lr": _NOT_NEGATIVE,
    "optim.vision_lr": _POSITIVE,
    "optim.projector_lr": _POSITIVE,
    "optim.llm_lr": _POSITIVE,
    "optim.words_lr": _POSITIVE,
    "optim.warmup": _SHARE,
    "optim.weight_decay": _NOT_NEGATIVE,
    "optim.beta1": _SHARE,
    "optim.beta2": _SHARE,
    "optim.eps": _POSITIVE,
    "optim.clip_norm": _NOT_NEGATIVE,
    "loss.lm_weight": _NOT_NEGATIVE,
    "loss.vm_weight": _NOT_NEGATIVE,
    "train.global_batch": _COUNT,
    "train.micro_batch": _COUNT,
    "train.epochs": _POSITIVE,
    "train.steps": _COUNT,
    "train.seed": _COUNT_OR_NONE,
    "train.eval_every_steps": _COUNT_OR_NONE,
    "train.eval_samples": _COUNT,
    "checkpoint.every_steps": _COUNT_OR_NONE,
    "checkpoint.keep_last": _COUNT_OR_NONE,
}


def find_problems(config: Config, world_size: int) -> list[str]:
    """Everything that keeps `config` from running on `world_size` ranks; each names the field and the legal values."""
    problems = []
    illegal = set()
    for name, (holds, legal) in _LIMITS.items():
        value = attrgetter(name)(config)
        if value is not None and not holds(value):
            illegal.add(name)
            problems.append(f"{name}={value} must be {legal}")
    for name in ("model.family", "data.path", "checkpoint.dir"):
        if not attrgetter(name)(config):
            problems.append(f"{name} must not be empty")
    sizes = {"parallel.tp", "parallel.pp", "parallel.virtual_stages", "train.global_batch", "train.micro_batch"}
    if not illegal & sizes:
        problems += _layout_problems(config, world_size)

    model, optim, train = config.model, config.optim, config.train
    if model.pretrained is None and model.config is None:
        problems.append(
            "model.pretrained, model.config: nothing gives the sizes; set the first to a megamm checkpoint, or the "
            "second to a Hugging Face config.json"
        )
    if not illegal & {"optim.lr", "optim.min_lr"} and optim.min_lr > optim.lr:
        problems.append(f"optim.min_lr={optim.min_lr} must not be above optim.lr={optim.lr}")
    unknown = [item for item in train.freeze if not is_legal(item)]
    if unknown:
        problems.append(f"train.freeze={', '.join(unknown)} must be any of {LEGAL}")
    if config.loss.lm_weight == config.loss.vm_weight == 0:
        problems.append("loss.lm_weight=0, loss.vm_weight=0 leaves nothing to minimise; set one of them")
    if train.eval_every_steps > 0 and config.data.eval_path is None:
        problems.append(
            f"train.eval_every_steps={train.eval_every_steps} needs data.eval_path, the data to evaluate on; "
            "or set it to 0"
        )
    if config.data.group_by_modality_length and config.data.packing:
        problems.append(
            "data.group_by_modality_length=True saves padding, of which data.packing=True leaves none: choose one"
        )
    if config.data.group_by_modality_length and not config.data.shuffle:
        problems.append(
            "data.group_by_modality_length=True draws an order of its own, data.shuffle=False keeps the stored one; "
            "set one or the other"
        )
    if train.precision == "fp8" and train.backend == "cpu":
        problems.append("train.precision=fp8 needs a GPU with Transformer Engine; train.backend=cpu has fp32 and bf16")
    return problems


def _layout_problems(config: Config, world_size: int) -> list[str]:
    """How the world is divided, and the batch over it."""
    problems = []
    parallel, train = config.parallel, config.train
    if parallel.sequence_parallel and parallel.tp == 1:
        problems.append("parallel.sequence_parallel=True needs parallel.tp above 1; set one or the other")
    if parallel.virtual_stages > 1 and parallel.pp == 1:
        problems.append(
            f"parallel.virtual_stages={parallel.virtual_stages} needs parallel.pp above 1; set one or the other"
        )
    if parallel.virtual_stages > 1 and parallel.layout != "auto":
        problems.append(
            f"parallel.virtual_stages={parallel.virtual_stages} is for parallel.layout=auto; an explicit cut has as "
            "many as its length says: leave it at 1"
        )
    model_parallel = parallel.tp * parallel.pp
    dp, left_over = divmod(world_size, model_parallel)
    if left_over or dp == 0:
        problems.append(
            f"parallel.tp={parallel.tp} x parallel.pp={parallel.pp} = {model_parallel} must divide the world size of "
            f"{world_size} ranks: legal products are {', '.join(map(str, _divisors(world_size)))}; or start "
            f"{model_parallel} ranks or a multiple, with torchrun --nproc-per-node {model_parallel} -m megamm.train ..."
        )
        return problems
    at_once = dp * train.micro_batch
    if train.global_batch % at_once:
        below = train.global_batch - train.global_batch % at_once
        nearest = f"{below} or {below + at_once}" if below else str(at_once)
        remedy = f"nearest: {nearest}"
        if train.global_batch % dp == 0:
            legal = ", ".join(map(str, _divisors(train.global_batch // dp)))
            remedy += f"; or one of train.micro_batch={legal}"
        problems.append(
            f"train.global_batch={train.global_batch} must be a multiple of {at_once}: dp={dp} (world size "
            f"{world_size} / {model_parallel}) x train.micro_batch={train.micro_batch}; {remedy}"
        )
    return problems


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
