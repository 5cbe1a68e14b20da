"""The optimizer against torch's AdamW and transformers' schedules, given the same gradients."""

import dataclasses

import pytest
import torch
from transformers import get_scheduler

from megamm.config.schema import Config, Optim
from megamm.models.parameters import canonical_parameters
from megamm.training.optim import build_optimizer, build_schedule, wrap
from megamm.training.step import run_pipeline
from tests.training import jobs
from tests.training.test_layouts import at, config  # noqa: F401 - a fixture

STEPS = 8
NAMES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
"""A schedule of ours -> transformers' name for it."""


def follow(config: Config) -> tuple[list[tuple[float, float]], dict[str, tuple[torch.Tensor, torch.Tensor]]]:  # noqa: F811
    """Some steps on one batch -> (gradient norm, torch's) of each, and (weights, torch's) by canonical name."""
    stages, batches = jobs.start(config)
    optim, wrapped = config.optim, wrap(stages)
    optimizer = build_optimizer(optim, wrapped)
    schedule = build_schedule(optim, optimizer, STEPS)
    ours = dict(canonical_parameters(stages))
    theirs = {name: p.detach().clone().requires_grad_() for name, p in ours.items()}
    groups = []
    for name, parameter in theirs.items():
        lr = getattr(optim, f"{name.split('.')[0]}_lr")
        decay = 0.0 if parameter.dim() == 1 else optim.weight_decay  # biases and norms
        groups.append({"params": [parameter], "lr": optim.lr if lr is None else lr, "weight_decay": decay})
    adam = torch.optim.AdamW(groups, betas=(optim.beta1, optim.beta2), eps=optim.eps)
    rates = get_scheduler(NAMES[optim.schedule], adam, round(optim.warmup * STEPS), STEPS)
    norms = []
    for _ in range(STEPS):
        wrapped[0].zero_grad_buffer()
        optimizer.zero_grad()
        run_pipeline(wrapped, batches)
        for name, parameter in ours.items():  # before they are clipped where they lie
            theirs[name].grad = parameter.main_grad.clone()
        _, norm, _ = optimizer.step()
        schedule.step(increment=1)
        expected = torch.nn.utils.clip_grad_norm_(theirs.values(), optim.clip_norm or torch.inf)
        norms.append((float(norm), expected.item()))
        adam.step()
        rates.step()
    return norms, {name: (ours[name].detach().clone(), theirs[name].detach()) for name in ours}


@pytest.mark.parametrize(
    "optim",
    [
        Optim(lr=3e-3, warmup=0.25, weight_decay=0.1, projector_lr=1e-3, vision_lr=5e-4, clip_norm=0.3),
        Optim(lr=3e-3, schedule="linear", warmup=0.5, beta1=0.8, beta2=0.9, eps=1e-6, clip_norm=0.0),
        Optim(lr=3e-3, schedule="constant", warmup=0.25, weight_decay=0.2, llm_lr=1e-4),
    ],
    ids=lambda optim: optim.schedule,
)
def test_weights_are_those_of_torchs_adamw(optim, config, pool, tmp_path):  # noqa: F811
    run = dataclasses.replace(at(config, tmp_path, steps=STEPS), optim=optim)
    [(norms, weights)] = pool.run(follow, run, ranks=1)
    assert [ours for ours, _ in norms] == pytest.approx([theirs for _, theirs in norms], rel=1e-5)
    assert max(norm for norm, _ in norms) > optim.clip_norm, "nothing is clipped"
    for name, (ours, theirs) in weights.items():
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7, msg=name)
