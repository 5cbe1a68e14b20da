"""Training with visual words: two terms, each a mean of its own, whatever layout and micro-batch; copies stay equal."""

import dataclasses
from pathlib import Path

import pytest
import torch

from megamm.config.schema import Checkpoint, Config, Data, Loss, Model, Optim, Parallel, Train
from megamm.errors import ConfigError
from megamm.registry import family
from megamm.testing.data import random_dataset
from megamm.training.setup import plan
from megamm.weights.convert import import_hf
from megamm.weights.torch_dist import StoredTensors
from tests.models.words import odd_release
from tests.training import jobs
from tests.training.test_layouts import LAYOUTS, RANKS, assert_same, at

STEPS = 6
NATIVE = str(Path(__file__).parents[1] / "golden/llava/hf_native/hf/config.json")
FAMILIES = ("vw_lmm", "vw_lmm_pif")
SEVERAL = ("tp2 pp2 sp", "pp2 interleaved cut in the tower", "tp2 dp2 sp", "tp4 sp, more ranks than key/value groups")


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory):
    """A dataset for each family, with samples of 0 to 2 pictures."""
    folder = tmp_path_factory.mktemp("data")
    for name in FAMILIES:
        random_dataset(folder / name, num_samples=30, vocab_size=120, family=name)
    return folder


@pytest.fixture(scope="module")
def starts(golden, tmp_path_factory):
    """The golden of each family, imported."""
    folder = tmp_path_factory.mktemp("starts")
    for name in FAMILIES:
        hf = odd_release(golden / "vw_lmm" / ("pif" if name == "vw_lmm_pif" else "llama") / "hf", folder / f"{name}-hf")
        import_hf(hf, hf / "vision_tower", [family(name)], folder / name)
    return folder


@pytest.fixture
def config(prefixes, starts):
    """A run of a few steps from the golden's weights, cut to an odd vocabulary, so that there is padding."""

    def make(name: str, **changes) -> Config:
        return Config(
            model=Model(family=name, pretrained=str(starts / name)),
            data=Data(path=str(prefixes / name), max_tokens=40, num_workers=0),
            optim=Optim(lr=3e-3, warmup=0.1, weight_decay=0.1, words_lr=1e-2),
            train=Train(global_batch=4, micro_batch=1, steps=STEPS, precision="fp32"),
            checkpoint=Checkpoint(dir="set by each test", every_steps=3, keep_last=0),
            **changes,
        )

    return make


def assert_same_terms(found, expected):
    assert_same(found, expected)
    for a, b in zip(found, expected, strict=True):
        for name in ("loss_lm", "loss_vm"):
            assert a[name] == pytest.approx(b[name], abs=1e-5), f"step {a['step']}"


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_both_terms_depend_on_no_layout_and_no_micro_batch(name, config, pool, tmp_path):
    lines = pool.run(jobs.train, at(config(name), tmp_path / "one"), ranks=1)[0]
    assert all(line["loss"] == pytest.approx(line["loss_lm"] + line["loss_vm"], abs=1e-6) for line in lines)
    assert lines[-1]["loss_vm"] < lines[0]["loss_vm"] - 0.01, "it does not learn: equal losses would prove nothing"
    large = pool.run(jobs.train, at(config(name), tmp_path / "large", micro_batch=4), ranks=1)[0]
    assert_same_terms(large, lines)
    for layout in SEVERAL:
        directory = tmp_path / layout.split(",")[0]
        found = pool.run(jobs.train, at(config(name), directory, LAYOUTS[layout]), ranks=RANKS[layout])[0]
        assert_same_terms(found, lines)
    recomputed = at(config(name), tmp_path / "again", LAYOUTS["tp2 pp2 sp"], recompute="full")
    assert_same_terms(pool.run(jobs.train, recomputed, ranks=4)[0], lines)
    # The copies in two stages are one weight in the checkpoint, and a run that had them goes on with one.
    jobs.drop_after(tmp_path / "tp2 pp2 sp", 3)
    assert_same_terms(pool.run(jobs.train, at(config(name), tmp_path / "tp2 pp2 sp"), ranks=1)[0], lines)
    jobs.drop_after(tmp_path / "one", 3)
    elsewhere = Parallel(pp=2, layout="Vvvv|PEt|tt|L")
    assert_same_terms(pool.run(jobs.train, at(config(name), tmp_path / "one", elsewhere), ranks=4)[0], lines)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("detach_teacher", [False, True])
def test_the_head_alone_learns_from_the_llm(name, detach_teacher, config, pool, tmp_path):
    loss = Loss(lm_weight=0.0, teacher="llm", detach_teacher=detach_teacher)
    frozen = dict(freeze=("vision", "projector", "llm"))
    alone = config(name, loss=loss)
    lines = pool.run(jobs.train, at(alone, tmp_path / "one", **frozen), ranks=1)[0]
    assert all(line["loss"] == pytest.approx(line["loss_vm"]) for line in lines)
    assert lines[-1]["loss_vm"] < lines[0]["loss_vm"] * 0.99
    found = pool.run(jobs.train, at(alone, tmp_path / "four", LAYOUTS["tp2 pp2 sp"], **frozen), ranks=4)[0]
    assert_same_terms(found, lines)
    first, last = (StoredTensors(tmp_path / f"four/step_0000000{step}") for step in (3, 6))
    changed = [n for n in first.infos if n.startswith(("vision", "projector", "llm", "words"))
               and not torch.equal(first.read(n), last.read(n))]  # fmt: skip
    assert changed == ["words.vm_head.weight"]


def test_a_detached_teacher_does_not_learn(config, pool, tmp_path):
    """Nothing else moves the head of a model whose llm reads visual tokens; yet it gets its, empty, gradient."""
    options = config("vw_lmm", loss=Loss(detach_teacher=True))
    options.optim.weight_decay = 0.0
    pool.run(jobs.train, at(options, tmp_path, Parallel(tp=2)), ranks=2)
    first, last = (StoredTensors(tmp_path / f"step_0000000{step}") for step in (3, 6))
    assert torch.equal(first.read("words.vm_head.weight"), last.read("words.vm_head.weight"))
    assert not torch.equal(first.read("llm.output_layer.weight"), last.read("llm.output_layer.weight"))


@pytest.mark.parametrize(
    ("name", "freeze", "loss", "message"),
    [
        ("llava", ("words",), Loss(), "freeze=words: family llava has none; its parts are vision, projector, llm"),
        ("llava", ("vision", "projector", "llm"), Loss(), "leaves nothing to train"),
        ("vw_lmm", ("vision", "projector", "llm", "words"), Loss(), "leaves nothing to train"),
        ("llava", (), Loss(teacher="llm", vm_weight=2.0), "loss.vm_weight, loss.teacher: family llava has no visual"),
    ],
)
def test_what_a_model_has_not_cannot_be_chosen(name, freeze, loss, message, config):
    wrong = config("vw_lmm", loss=loss)
    wrong.model, wrong.train.freeze = Model(family=name, config=NATIVE), freeze
    wrong.data.path = str(Path(wrong.data.path).with_name("absent"))
    with pytest.raises(ConfigError, match=message):
        plan(dataclasses.replace(wrong), 1, needs_files=False)


@pytest.mark.parametrize("loss", [Loss(), Loss(detach_teacher=True)], ids=["both move", "teacher stays"])
def test_gradients_that_are_reduced_while_others_are_computed_are_whole(loss, config, pool, tmp_path):
    """Every weight is ready once a pass, however many chunks used it, or none: two replicas, several buckets."""
    options = config("vw_lmm_pif", loss=loss)
    lines = pool.run(jobs.train, at(options, tmp_path / "one"), ranks=1)[0]
    found, buckets = pool.run(jobs.train_in_buckets, at(options, tmp_path / "four", Parallel(pp=2)), ranks=4)[0]
    assert buckets > 2
    assert_same_terms(found, lines)
