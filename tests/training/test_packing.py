"""Samples in one row are what they are in rows of their own: the same loss, the same gradient of every parameter."""

import dataclasses

import numpy as np
import pytest

from megamm.batch import IMAGE
from megamm.config.schema import Checkpoint, Config, Data, Model, Optim, Parallel, Train
from megamm.data.blend import write_blend
from megamm.data.indexed import Reader, Writer
from megamm.registry import family
from megamm.testing.data import png, random_dataset
from megamm.weights.convert import import_hf
from tests.families import VARIANTS, Variant
from tests.training import jobs

TOGETHER = [[0, 1, 2, 3, 4], [5, 6], [7], [8, 9, 10, 11]]
"""Samples of each micro-batch; among them some without pictures, with one and with several."""


def write_samples(prefix, name: str) -> None:
    """12 samples. Targets begin with the first token, half of the pictures, too: what stands in front of a sample in a
    row would be asked to predict it, and must not be."""
    draw = np.random.RandomState(0)
    with Writer(prefix) as writer:
        for i in range(12):
            ids = draw.randint(3, 128, size=draw.randint(8, 25)).astype(np.int32)
            ids[i % 2 : i % 2 + i % 4] = IMAGE
            pictures = [png(draw.randint(0, 256, size=(20, 30, 3), dtype=np.uint8)) for _ in range(i % 4)]
            writer.add(ids, pictures, np.array([[0, len(ids)]], dtype=np.int32))
        writer.finish({"family": name} | ({"placeholder": [7, 8]} if name == "mplug_owl3" else {}))


def start(variant: Variant, directory) -> Config:
    of_family = family(variant.family)
    import_hf(variant.hf, variant.tower, [of_family], directory / "start")
    write_samples(directory / "train", variant.family)
    return Config(
        model=Model(family=variant.family, pretrained=str(directory / "start")),
        data=Data(path=str(directory / "train"), max_tokens=256, packing=True, num_workers=0),
        optim=Optim(lr=1e-3),
        train=Train(global_batch=4, steps=1, precision="fp32"),
        checkpoint=Checkpoint(dir=str(directory / "run")),
    )


def check(config: Config, pool, parallel: Parallel) -> None:
    config.parallel = parallel
    for losses, norms in pool.run(jobs.packed_and_apart, config, TOGETHER, ranks=parallel.tp * parallel.pp):
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)
        total = sum(apart**2 for apart, _ in norms.values()) ** 0.5
        assert total > 0.01
        for parameter, (apart, difference) in norms.items():
            assert difference <= 1e-5 * apart + 1e-7 * total, parameter


ALL = [Variant("llava/hf_native", "hf"), *VARIANTS]


@pytest.mark.parametrize("variant", ALL, ids=lambda variant: variant.path)
def test_packed_equals_apart(variant, pool, tmp_path):
    check(start(variant, tmp_path), pool, Parallel(tp=2, pp=2, sequence_parallel=True))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ALL, ids=lambda variant: variant.path)
def test_packed_equals_apart_at_other_layouts_and_recomputed(variant, pool, tmp_path):
    config = start(variant, tmp_path)
    for parallel in (Parallel(), Parallel(tp=2, sequence_parallel=True), Parallel(pp=2)):
        check(config, pool, parallel)
    config.train.recompute = "full"
    check(config, pool, Parallel(tp=2, sequence_parallel=True))


@pytest.mark.slow
def test_a_packed_run_through_a_blend_goes_on_at_another_layout(pool, tmp_path):
    config = start(Variant("llava/hf_native", "hf"), tmp_path)
    random_dataset(tmp_path / "more", num_samples=17, vocab_size=128, seed=1)
    write_blend(tmp_path / "mix", [Reader(tmp_path / "train"), Reader(tmp_path / "more")], [12, 8], seed=0)
    config.data = dataclasses.replace(config.data, path=str(tmp_path / "mix"), max_tokens=96)
    config.train = dataclasses.replace(config.train, global_batch=2, steps=8)
    config.checkpoint.every_steps = 4

    def at(name: str, parallel: Parallel) -> Config:
        of_run = dataclasses.replace(config.checkpoint, dir=str(tmp_path / name))
        return dataclasses.replace(config, parallel=parallel, checkpoint=of_run)

    expected = pool.run(jobs.train, at("one", Parallel()), ranks=1)[0]
    split = Parallel(tp=2, pp=2, sequence_parallel=True)
    pool.run(jobs.train_until, at("resumed", split), 4, ranks=4)
    found = pool.run(jobs.train, at("resumed", Parallel()), ranks=2)[0]
    assert [line["samples"] for line in found] == [line["samples"] for line in expected]
    assert 8 * 2 < expected[-1]["samples"] < 8 * 2 * 5
    for mine, one in zip(found, expected, strict=True):
        assert mine["loss"] == pytest.approx(one["loss"], abs=1e-5), one["step"]
        assert mine["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4), one["step"]
