"""Every rule of a configuration is broken once; a sound one passes."""

from operator import attrgetter
from typing import Any

import pytest

from megamm.config import Checkpoint, Config, Data, Model, Optim, Parallel, Train
from megamm.config.check import find_problems


def sound(**changes: Any) -> Config:
    config = Config(
        model=Model(family="llava", config="config.json"),
        data=Data(path="data/x"),
        optim=Optim(lr=1e-3),
        train=Train(global_batch=64, micro_batch=2),
        checkpoint=Checkpoint(dir="runs/x"),
        parallel=Parallel(tp=2, pp=2, sequence_parallel=True),
    )
    for name, value in changes.items():
        section, field = name.split("__")
        setattr(attrgetter(section)(config), field, value)
    return config


def test_a_sound_configuration_passes() -> None:
    assert not find_problems(sound(), 8)
    assert not find_problems(sound(train__freeze=("vision[:12]", "llm[:2]")), 8)
    changes = {"train__freeze": ("vision", "llm"), "train__eval_every_steps": 5, "data__eval_path": "data/y"}
    assert not find_problems(sound(**changes), 4)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"parallel__tp": 0}, "parallel.tp=0 must be 1 or more"),
        ({"train__global_batch": -8}, "train.global_batch=-8 must be 1 or more"),
        ({"optim__lr": 0.0}, "optim.lr=0.0 must be above 0"),
        ({"optim__lr": float("nan")}, "optim.lr=nan must be above 0"),
        ({"optim__lr": float("inf")}, "optim.lr=inf must be above 0"),
        ({"optim__vision_lr": -1.0}, "optim.vision_lr=-1.0 must be above 0"),
        ({"optim__warmup": 1.0}, "optim.warmup=1.0 must be at least 0 and below 1"),
        ({"optim__beta2": 1.0}, "optim.beta2=1.0 must be at least 0 and below 1"),
        ({"optim__min_lr": 1.0}, "optim.min_lr=1.0 must not be above optim.lr=0.001"),
        ({"train__steps": 0}, "train.steps=0 must be 1 or more"),
        ({"train__epochs": 0.0}, "train.epochs=0.0 must be above 0"),
        ({"checkpoint__dir": ""}, "checkpoint.dir must not be empty"),
        ({"parallel__tp": 3}, "= 6 must divide the world size of 8 ranks: legal products are 1, 2, 4, 8"),
        ({"parallel__tp": 1}, "parallel.sequence_parallel=True needs parallel.tp above 1"),
        ({"train__global_batch": 66}, "4: dp=2 (world size 8 / 4) x train.micro_batch=2; nearest: 64 or 68; "),
        ({"train__global_batch": 66}, "or one of train.micro_batch=1, 3, 11, 33"),
        ({"train__global_batch": 3}, "nearest: 4"),
        ({"model__config": None}, "model.pretrained, model.config: nothing gives the sizes"),
        ({"train__freeze": ("tower",)}, "train.freeze=tower must be any of vision, projector, llm, words"),
        ({"loss__lm_weight": 0.0, "loss__vm_weight": 0.0}, "leaves nothing to minimise"),
        ({"loss__vm_weight": -1.0}, "loss.vm_weight=-1.0 must be 0 or above"),
        ({"train__freeze": ("vision[:0]", "projector[:2]")}, "train.freeze=vision[:0], projector[:2] must be any of"),
        ({"train__eval_every_steps": 10}, "train.eval_every_steps=10 needs data.eval_path"),
        (
            {"data__group_by_modality_length": True, "data__shuffle": False},
            "data.group_by_modality_length=True draws an order of its own, data.shuffle=False",
        ),
        ({"train__precision": "fp8", "train__backend": "cpu"}, "train.precision=fp8 needs a GPU"),
    ],
)
def test_each_problem_is_told_with_what_is_legal(changes: dict[str, Any], expected: str) -> None:
    (problem,) = find_problems(sound(**changes), 8)
    assert expected in problem


def test_more_ranks_per_replica_than_there_are() -> None:
    (problem,) = find_problems(sound(), world_size=2)
    assert "parallel.tp=2 x parallel.pp=2 = 4 must divide the world size of 2 ranks: legal products are 1, 2" in problem
    assert "torchrun --nproc-per-node 4 -m megamm.train" in problem


def test_all_problems_are_told_at_once() -> None:
    config = sound(train__freeze=("tower",), train__eval_every_steps=10, optim__min_lr=1.0, train__global_batch=66)
    assert len(find_problems(config, 8)) == 4
