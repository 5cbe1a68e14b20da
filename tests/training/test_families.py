"""Every family trains, and what it learns depends on no layout: 20 steps from the same start at five of them."""

import json
import os
from pathlib import Path

import pytest

from data_tools import preprocess
from examples.quickstart import draw, make_model
from megamm.config.schema import Checkpoint, Config, Data, Model, Optim, Parallel, Train
from megamm.registry import FAMILIES, family
from megamm.testing.families import TINY, tiny
from megamm.testing.tiny import tiny_llava
from megamm.weights.convert import import_hf
from tests.training import jobs

OWLEVAL = Path(os.environ.get("MEGAMM_OWLEVAL", Path(__file__).parents[3] / "shared/data/owleval"))
LAYOUTS = {
    "2 1 1": (Parallel(tp=2, sequence_parallel=True), 2),
    "1 2 1": (Parallel(pp=2), 2),
    "2 2 1": (Parallel(tp=2, pp=2, sequence_parallel=True), 4),
    "1 1 2": (Parallel(), 2),
}
"""tp, pp, dp -> how, on how many ranks; beside one rank alone."""


def start(name: str, source: Path, image_dir: Path, directory: Path) -> Config:
    """A run of 20 steps: a tiny model of the family and the conversations of `source`."""
    texts = make_model.texts(source)
    if name == "llava":
        tiny_llava(directory / "hf", texts=texts)
    else:
        tiny(directory / "hf", name, texts=texts)
    import_hf(directory / "hf", None, [family(name)], directory / "start")
    preprocess.main(
        preprocess.Options(
            input=(source,),
            image_dir=image_dir,
            family=name,
            template=TINY[name].template if name in TINY else None,
            tokenizer=directory / "hf",
            output=str(directory / "train"),
            max_bad=0.0,
        )
    )
    return Config(
        model=Model(family=name, pretrained=str(directory / "start")),
        data=Data(path=str(directory / "train"), max_tokens=160, num_workers=0),
        optim=Optim(lr=5e-4, warmup=0.1),
        train=Train(global_batch=4, micro_batch=2, steps=20, precision="fp32"),
        checkpoint=Checkpoint(dir="set by each run", every_steps=0),
    )


def check(config: Config, pool, directory: Path) -> None:
    def run(parallel: Parallel, ranks: int) -> list[dict]:
        config.parallel, config.checkpoint.dir = parallel, str(directory / f"run-{parallel.tp}-{parallel.pp}-{ranks}")
        return pool.run(jobs.train, config, ranks=ranks)[0]

    expected = run(Parallel(), 1)
    losses = [line["loss"] for line in expected]
    assert len(losses) == 20 and sum(losses[-5:]) < sum(losses[:5]) - 0.5, "it does not learn"
    for name, (parallel, ranks) in LAYOUTS.items():
        for mine, one in zip(run(parallel, ranks), expected, strict=True):
            assert mine["loss"] == pytest.approx(one["loss"], abs=1e-5), f"{name}, step {one['step']}"
            assert mine["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4), f"{name}, step {one['step']}"


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("pictures", ["owleval" if OWLEVAL.is_dir() else "drawn"])
def test_20_steps_at_five_layouts(name, pictures, pool, tmp_path):
    """On OwlEval's photographs and conversations where they are, else on drawn pictures; the test's id says which."""
    if pictures == "drawn":
        draw.draw(tmp_path / "data", num_train=60, num_heldout=4, seed=0)
        source, image_dir = tmp_path / "data/train.json", tmp_path / "data/images"
    else:
        source, image_dir = tmp_path / "owleval.json", OWLEVAL / "images"
        source.write_text(json.dumps(json.loads((OWLEVAL / "llava.json").read_text())[:120]))
    check(start(name, source, image_dir, tmp_path), pool, tmp_path)
