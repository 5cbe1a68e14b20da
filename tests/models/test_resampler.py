"""Both resamplers against the formulas of the authors' code, outputs and gradients, with tensor parallelism."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from megamm import backend
from megamm.config.schema import Checkpoint, Config, Data, Model, Optim, Parallel, Train
from megamm.errors import CheckpointError
from megamm.models.build import units
from megamm.models.options import ProjectorOptions
from megamm.models.projector import published
from megamm.models.projector.resampler_layers import Resampler
from megamm.models.spec import Build, projector_config
from megamm.parallel import groups
from megamm.parallel.groups import gather_over_tp
from megamm.parallel.placement import Layout, Unit
from megamm.registry import family
from megamm.testing.data import random_dataset
from megamm.weights.convert import export_hf, import_hf
from megamm.weights.draw import draw
from megamm.weights.hf import read_config
from tests.models.test_projector import assert_equal_up_to_rounding
from tests.training import jobs

IN, OUT = 20, 32
CONFIG = {"resampler_hidden_size": 48, "num_queries": 6, "num_resampler_layers": 2}
PREFIX = "connector."


def options(kind: str) -> ProjectorOptions:
    return published.read({**CONFIG, "type": "resampler"}, "type", "linear", (kind,), in_size=IN, out_size=OUT)


def weights(kind: str) -> dict[str, torch.Tensor]:
    """Under the authors' names."""
    generator = torch.Generator().manual_seed(1)
    entries = published.keys(options(kind), PREFIX).entries()
    names = {key: shape for entry in entries for key, shape in zip(entry.hf, entry.hf_shapes, strict=True)}
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in names.items()}


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int) -> torch.Tensor:
    """[I, N, heads * D], three times -> [I, N, heads * D]; softmax over the keys."""
    query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    scores = query @ key.transpose(-1, -2) / query.size(-1) ** 0.5
    return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)


def formula(kind: str, w: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """x [I, P, hv] -> [I, Q, H], as TinyLLaVA Bench's Resampler and TinyLLaVA_Factory's PerceiverResampler do it."""
    w = {name.removeprefix(PREFIX): tensor for name, tensor in w.items()}

    def norm(name: str, y: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(y, y.shape[-1:], w[name + ".weight"], w[name + ".bias"])

    def mlp(name: str, y: torch.Tensor) -> torch.Tensor:
        return F.gelu(norm(name + ".0", y) @ w[name + ".1.weight"].T) @ w[name + ".3.weight"].T

    if kind == "resampler":
        q = w["queries"].expand(len(x), -1, -1)
        for i in range(2):
            block = f"resampler_blocks.{i}."
            seen, own = norm(block + "norm_image", x), norm(block + "norm_hidden", q)
            projected = (y @ w[f"{block}to_{n}.weight"].T for n, y in (("q", own), ("k", seen), ("v", seen)))
            q = attend(*projected, heads=12) @ w[block + "to_out.weight"].T + q
            q = mlp(block + "feed_forward", q) + q
        return norm("post_norm", q) @ w["final_proj.weight"].T
    x, q = x @ w["linear.weight"].T + w["linear.bias"], w["latents"].expand(len(x), -1, -1)
    for i in range(2):
        block = f"layers.{i}."
        own = norm(block + "0.norm_latents", q)
        seen = torch.cat([norm(block + "0.norm_media", x), own], dim=1)
        key, value = (seen @ w[block + "0.to_kv.weight"].T).chunk(2, dim=-1)
        q = attend(own @ w[block + "0.to_q.weight"].T, key, value, heads=8) @ w[block + "0.to_out.weight"].T + q
        q = mlp(block + "1", q) + q
    return norm("norm", q)


def features() -> torch.Tensor:
    return torch.randn(5, 3, IN, generator=torch.Generator().manual_seed(2))


def project(kind: str, tp: int, recompute: str) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Output, gradient of the input, and gradients of the weights under the authors' names."""
    backend.start("cpu")
    layout = Layout((tuple(Unit(name, 1.0, 1, 1) for name in ("projector", "llm.embed", "llm.head")),), 1)
    groups.start_distributed()
    ranks = groups.start(Parallel(tp=tp), layout)
    build = Build(tp=tp, layout=layout, recompute=recompute)
    module = Resampler(options(kind), projector_config(options(kind), build))
    table, parameters = published.keys(options(kind), PREFIX), dict(module.named_parameters())
    assert sorted(parameters) == sorted(entry.name.removeprefix("projector.") for entry in table.entries())
    whole = weights(kind)
    with torch.no_grad():
        for entry in table.entries():
            packed = entry.pack([whole[key] for key in entry.hf])
            parameters[entry.name.removeprefix("projector.")].copy_(entry.slice(packed, ranks.tp_rank, tp))
    x_PIH = features().requires_grad_()
    out = module(x_PIH)
    out.square().sum().backward()
    grads = {}
    for entry in table.entries():
        grad = parameters[entry.name.removeprefix("projector.")].grad
        grads |= entry.to_hf(gather_over_tp(grad) if entry.partition_dim is not None else [grad])
    return out.detach(), x_PIH.grad, grads


@pytest.mark.parametrize("kind", ["resampler", "perceiver"])
@pytest.mark.parametrize(("tp", "recompute"), [(1, "none"), (2, "none"), (4, "none"), (2, "full")])
def test_resampler_equals_the_formula(kind, tp, recompute, pool):
    own = {name: tensor.requires_grad_() for name, tensor in weights(kind).items()}
    x = features().requires_grad_()
    expected = formula(kind, own, x.transpose(0, 1)).transpose(0, 1)
    expected.square().sum().backward()
    for out, grad_x, grads in pool.run(project, kind, tp, recompute, ranks=tp):
        assert_equal_up_to_rounding(out, expected.detach(), "output")
        assert_equal_up_to_rounding(grad_x, x.grad, "input")
        assert grads.keys() == own.keys()
        for name, grad in grads.items():
            assert_equal_up_to_rounding(grad, own[name].grad, name)


@pytest.mark.parametrize(
    ("variant", "changes"),
    [
        ("tinyllama", {"mm_projector_type": "resampler", "resampler_hidden_size": 24, "num_queries": 7}),
        ("factory_qwen2", {"connector_type": "resampler", "num_resampler_layers": 2}),
    ],
)
def test_sizes_come_from_the_config_and_go_back(golden, variant, changes):
    hf = golden / "tinyllava" / variant / "hf"
    config = read_config(hf) | changes
    tower = read_config(hf / "vision_tower") if "mm_projector_type" in changes else None
    options = family("tinyllava").read(config, tower)
    assert options.tokens_per_image == options.projector.num_queries == config["num_queries"]
    dialect = "original" if tower else "factory"
    assert family("tinyllava").write(options, dialect) == (config, tower)
    (unit,) = (u for u in units(options, num_tokens=1, num_images=1, seq_length=1) if u.name == "projector")
    table = family("tinyllava").keys[dialect](options)
    assert unit.parameters == sum(e.num_elements for e in table.entries() if e.name.startswith("projector."))
    with pytest.raises(CheckpointError, match="projector of kind"):
        family("tinyllava").write(options, "hf")


def test_a_width_that_its_heads_do_not_divide_is_refused():
    with pytest.raises(CheckpointError, match="resampler_hidden_size 50 must be a multiple of 12"):
        published.read(
            {"resampler_hidden_size": 50, "t": "resampler"}, "t", "linear", ("resampler",), in_size=8, out_size=8
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "field"), [("tinyllama", "mm_projector_type"), ("factory_qwen2", "connector_type")]
)
def test_a_model_with_a_resampler_trains_the_same_at_every_layout(variant, field, golden, pool, tmp_path):
    """Written as a release, imported, trained on one rank and on more, with the resampler alone on a stage, too."""
    hf = golden / "tinyllava" / variant / "hf"
    sizes = {"num_queries": 7, "num_resampler_layers": 2, "resampler_hidden_size": 24}
    config = read_config(hf) | sizes | {field: "resampler"}
    tower = hf / "vision_tower" if (hf / "vision_tower").exists() else None
    options = family("tinyllava").read(config, read_config(tower) if tower else None)
    table = family("tinyllava").keys["original" if tower else "factory"](options)
    release = {name: tensor for name, tensor in load_file(hf / "model.safetensors").items() if "ector" not in name}
    for entry in table.entries():
        if entry.name.startswith("projector."):
            whole = draw(entry.name, entry.shape, 3)
            release |= {key: t.contiguous() for key, t in zip(entry.hf, entry.unpack(whole), strict=True)}
    (tmp_path / "hf").mkdir()
    save_file(release, tmp_path / "hf/model.safetensors")
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    import_hf(tmp_path / "hf", tower, [family("tinyllava")], tmp_path / "start")
    random_dataset(tmp_path / "data", num_samples=12, vocab_size=120, family="tinyllava")
    run = Config(
        model=Model(family="tinyllava", pretrained=str(tmp_path / "start")),
        data=Data(path=str(tmp_path / "data"), max_tokens=40, num_workers=0),
        optim=Optim(lr=3e-3),
        train=Train(global_batch=4, micro_batch=2, steps=4, precision="fp32"),
        checkpoint=Checkpoint(dir=str(tmp_path / "one")),
    )
    [expected] = pool.run(jobs.train, run, ranks=1)
    assert expected[-1]["loss"] < expected[0]["loss"]
    for k, parallel in enumerate(
        (Parallel(tp=2, pp=2, sequence_parallel=True), Parallel(pp=3, layout="Vvvvv|P|EtttL"))
    ):
        there = replace(run, parallel=parallel, checkpoint=Checkpoint(dir=str(tmp_path / f"more{k}")))
        found = pool.run(jobs.train, there, ranks=parallel.tp * parallel.pp)[0]
        for a, b in zip(found, expected, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    export_hf(tmp_path / "one", family("tinyllava"), tmp_path / "out")
    assert load_file(tmp_path / "out/model.safetensors").keys() == release.keys()
