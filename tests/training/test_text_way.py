"""Training only what visual tokens go through, the pretrain of mPLUG-Owl2 and mPLUG-Owl3, at several layouts."""

from dataclasses import dataclass

import pytest
import torch

from megamm.config.schema import Checkpoint, Config, Data, Model, Optim, Parallel, Train
from megamm.testing.data import random_dataset
from megamm.weights.torch_dist import StoredTensors
from tests.training import jobs


@dataclass(frozen=True, slots=True)
class Setup:
    """A family, and what its pretrain moves in the llm."""

    name: str
    variant: str
    cut: str
    moved: frozenset[str]
    placeholder: tuple[int, ...] | None = None


OWL2 = Setup(
    name="mplug_owl2",
    variant="mplug_owl2/llama",
    cut="Vv|vPE|t|ttL",
    # No target stands on a visual token, so behind the last attention nothing flows back to the last layer's norm.
    moved=frozenset(
        f"llm.decoder.layers.{i}.{module}.1.weight"
        for i in range(3)
        for module in ("input_layernorm", "pre_mlp_layernorm", "self_attention.linear_kv")
        if (i, module) != (2, "pre_mlp_layernorm")
    ),
)
OWL3 = Setup(
    name="mplug_owl3",
    variant="mplug_owl3/240728",
    cut="Vv|vPE|t|tttL",  # of four virtual stages the first two and the third know no visual token's weight in the llm
    moved=frozenset(
        f"llm.decoder.layers.{i}.self_attention.{module}.{kind}"
        for i in (1, 3)
        for module in ("linear_image_kv", "gate")
        for kind in ("weight", "bias")
    ),
    placeholder=(7, 8),
)


def layouts(setup: Setup) -> dict[str, Parallel]:
    return {
        "tp2 pp2 sp": Parallel(tp=2, pp=2, sequence_parallel=True),
        "pp2 interleaved cut in the tower": Parallel(pp=2, layout=setup.cut),
    }


def run(tmp_path, golden, name: str, parallel: Parallel, setup: Setup) -> Config:
    return Config(
        model=Model(family=setup.name, config=str(golden / setup.variant / "hf/config.json")),
        data=Data(path=str(tmp_path / "train"), max_tokens=48, num_workers=0),
        parallel=parallel,
        optim=Optim(lr=3e-3, warmup=0.1, weight_decay=0.1, projector_lr=1e-3),
        train=Train(
            global_batch=4, micro_batch=1, steps=6, precision="fp32", freeze=("llm.text",), recompute="full", seed=1
        ),
        checkpoint=Checkpoint(dir=str(tmp_path / name), every_steps=2, keep_last=0),
    )


@pytest.mark.slow
@pytest.mark.parametrize("setup", [OWL2, OWL3], ids=lambda setup: setup.name)
def test_the_text_way_stays_as_it_is_and_layouts_agree(setup, tmp_path, golden, pool):
    random_dataset(tmp_path / "train", num_samples=30, vocab_size=320, family=setup.name, placeholder=setup.placeholder)
    expected = pool.run(jobs.train, run(tmp_path, golden, "one", Parallel(), setup), ranks=1)[0]
    for name, parallel in layouts(setup).items():
        ranks = parallel.tp * parallel.pp
        found = pool.run(jobs.train, run(tmp_path, golden, name, parallel, setup), ranks=ranks)[0]
        for a, b in zip(found, expected, strict=True):
            assert abs(a["loss"] - b["loss"]) < 1e-5 and abs(a["grad_norm"] / b["grad_norm"] - 1) < 1e-4, a
    first, last = (StoredTensors(tmp_path / f"one/step_0000000{step}") for step in (2, 6))
    moved = {
        name
        for name in first.infos
        if name.startswith(("vision.", "projector.", "llm.")) and not torch.equal(first.read(name), last.read(name))
    }
    assert {name for name in moved if name.startswith("llm.")} == setup.moved
    assert {name.split(".")[0] for name in moved} == {"vision", "projector", "llm"}
