"""Training only what visual tokens go through: mPLUG-Owl2's pretrain, at several layouts."""

import torch

from megamm.config.schema import Checkpoint, Config, Data, Model, Optim, Parallel, Train
from megamm.testing.data import random_dataset
from megamm.weights.torch_dist import StoredTensors
from tests.training import jobs

LAYOUTS = {
    "tp2 pp2 sp": Parallel(tp=2, pp=2, sequence_parallel=True),
    "pp2 interleaved cut in the tower": Parallel(pp=2, layout="Vv|vPE|t|ttL"),
}


def run(tmp_path, golden, name: str, parallel: Parallel) -> Config:
    return Config(
        model=Model(family="mplug_owl2", config=str(golden / "mplug_owl2/llama/hf/config.json")),
        data=Data(path=str(tmp_path / "train"), max_tokens=48, num_workers=0),
        parallel=parallel,
        optim=Optim(lr=3e-3, warmup=0.1, weight_decay=0.1, projector_lr=1e-3),
        train=Train(
            global_batch=4, micro_batch=1, steps=6, precision="fp32", freeze=("llm.text",), recompute="full", seed=1
        ),
        checkpoint=Checkpoint(dir=str(tmp_path / name), every_steps=2, keep_last=0),
    )


def test_the_text_way_stays_as_it_is_and_layouts_agree(tmp_path, golden, pool):
    random_dataset(tmp_path / "train", num_samples=30, vocab_size=320, family="mplug_owl2")
    expected = pool.run(jobs.train, run(tmp_path, golden, "one", Parallel()), ranks=1)[0]
    for name, parallel in LAYOUTS.items():
        ranks = parallel.tp * parallel.pp
        found = pool.run(jobs.train, run(tmp_path, golden, name, parallel), ranks=ranks)[0]
        for a, b in zip(found, expected, strict=True):
            assert abs(a["loss"] - b["loss"]) < 1e-5 and abs(a["grad_norm"] / b["grad_norm"] - 1) < 1e-4, a
    first, last = (StoredTensors(tmp_path / f"one/step_0000000{step}") for step in (2, 6))
    moved = {
        name
        for name in first.infos
        if name.startswith(("vision.", "projector.", "llm.")) and not torch.equal(first.read(name), last.read(name))
    }
    visual = {
        f"llm.decoder.layers.{i}.{module}.1.weight"
        for i in range(3)
        for module in ("input_layernorm", "pre_mlp_layernorm", "self_attention.linear_kv")
    }
    # No target stands on a visual token, so behind the last attention nothing flows back to these.
    visual.remove("llm.decoder.layers.2.pre_mlp_layernorm.1.weight")
    assert {name for name in moved if name.startswith("llm.")} == visual
    assert {name.split(".")[0] for name in moved} == {"vision", "projector", "llm"}
