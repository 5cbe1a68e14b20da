"""The result of training depends on no layout, and a run goes on at any other layout."""

import dataclasses
import shutil

import pytest
import torch
from safetensors.torch import load_file

from megamm.config.frozen import is_frozen
from megamm.config.schema import PARTS, Checkpoint, Config, Data, Model, Optim, Parallel, Train
from megamm.models.parameters import unit_of
from megamm.registry import family
from megamm.testing.data import random_dataset
from megamm.weights.convert import export_hf, import_hf
from megamm.weights.torch_dist import StoredTensors
from tests.training import jobs

STEPS = 20
LAYOUTS = {
    "tp2": Parallel(tp=2),
    "tp2 sp": Parallel(tp=2, sequence_parallel=True),
    "pp2": Parallel(pp=2),
    "pp2 cut in the tower": Parallel(pp=2, layout="Vv|vvPEtttL"),
    "tp2 pp2 sp": Parallel(tp=2, pp=2, sequence_parallel=True),
    "dp2": Parallel(),
    "tp2 dp2 sp": Parallel(tp=2, sequence_parallel=True),
    "tp4 sp, more ranks than key/value groups": Parallel(tp=4, sequence_parallel=True),
    "pp2 interleaved": Parallel(pp=2, virtual_stages=2),
    "pp2 interleaved cut in the tower": Parallel(pp=2, layout="Vv|vvPE|t|ttL"),
    "tp2 pp2 sp interleaved": Parallel(tp=2, pp=2, sequence_parallel=True, virtual_stages=3),
}
RANKS = {name: layout.tp * layout.pp * (2 if "dp2" in name else 1) for name, layout in LAYOUTS.items()}


@pytest.fixture(scope="module")
def config(tmp_path_factory, golden):
    """A run of 20 steps on a drawn model of the golden's sizes, with samples of 0 to 2 pictures."""
    prefix = tmp_path_factory.mktemp("data") / "train"
    random_dataset(prefix, num_samples=50, vocab_size=120)
    return Config(
        model=Model(family="llava", config=str(golden / "llava/hf_native/hf/config.json")),
        data=Data(path=str(prefix), eval_path=str(prefix), max_tokens=40, num_workers=0),
        optim=Optim(lr=3e-3, warmup=0.1, weight_decay=0.1, projector_lr=1e-3),
        train=Train(global_batch=4, micro_batch=1, steps=STEPS, precision="fp32", eval_every_steps=10, eval_samples=7),
        checkpoint=Checkpoint(dir="set by each test", every_steps=10, keep_last=0),
    )


def at(config, directory, parallel=None, **train):
    return dataclasses.replace(
        config,
        parallel=parallel or Parallel(),
        train=dataclasses.replace(config.train, **train),
        checkpoint=dataclasses.replace(config.checkpoint, dir=str(directory)),
    )


@pytest.fixture(scope="module")
def reference(config, pool, tmp_path_factory):
    """The run on one rank, with its checkpoints at steps 10 and 20."""
    directory = tmp_path_factory.mktemp("reference")
    lines = pool.run(jobs.train, at(config, directory), ranks=1)[0]
    losses = [line["loss"] for line in lines]
    assert [line["step"] for line in lines if "eval_loss" in line] == [10, 20]
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.5, "it does not learn: equal losses would prove nothing"
    return directory, lines


def assert_same(found, expected, tolerance=1e-5):
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for a, b in zip(found, expected, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=tolerance), f"step {a['step']}"
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4), f"step {a['step']}"
        assert (a["lr"], a["samples"]) == (b["lr"], b["samples"])
        assert a.get("eval_loss") == pytest.approx(b.get("eval_loss"), abs=tolerance), f"step {a['step']}"


@pytest.mark.parametrize(
    "name", ["tp2 pp2 sp", *(pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS if name != "tp2 pp2 sp")]
)
def test_losses_equal_those_of_one_rank(name, config, reference, pool, tmp_path):
    config = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, every_steps=0))
    lines = pool.run(jobs.train, at(config, tmp_path, LAYOUTS[name]), ranks=RANKS[name])[0]
    assert_same(lines, reference[1])


@pytest.mark.slow
def test_losses_on_eight_ranks_equal_those_of_one(config, reference, pool8, tmp_path):
    parallel = Parallel(tp=2, pp=2, virtual_stages=2, sequence_parallel=True)
    lines = pool8.run(jobs.train, at(config, tmp_path, parallel, recompute="full"), ranks=8)[0]
    assert_same(lines, reference[1])


@pytest.mark.slow
def test_recomputation_changes_nothing(config, reference, pool, tmp_path):
    lines = pool.run(jobs.train, at(config, tmp_path, LAYOUTS["tp2 pp2 sp"], recompute="full"), ranks=4)[0]
    assert_same(lines, reference[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "freeze",
    [("vision",), ("vision", "llm"), ("llm",), ("vision", "projector"), ("vision[:2]",), ("vision[:1]", "llm[:2]")],
)
def test_frozen_parts_stay_as_they_are(freeze, config, pool, tmp_path):
    """At every layout the same losses, and the frozen tensors of the last checkpoint are those of the first."""
    short = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, eval_path=None),
        train=dataclasses.replace(config.train, steps=4, recompute="full", eval_every_steps=0),
        checkpoint=dataclasses.replace(config.checkpoint, every_steps=2),
    )
    expected = pool.run(jobs.train, at(short, tmp_path / "one", freeze=freeze), ranks=1)[0]
    for layout in ("tp2 pp2 sp", "pp2 interleaved cut in the tower"):
        directory = tmp_path / "four" if layout == "tp2 pp2 sp" else tmp_path / layout
        found = pool.run(jobs.train, at(short, directory, LAYOUTS[layout], freeze=freeze), ranks=RANKS[layout])[0]
        assert_same(found, expected)
    first, last = (StoredTensors(tmp_path / f"four/step_0000000{step}") for step in (2, 4))
    for name in first.infos:
        part = name.split(".")[0]
        if part in PARTS:
            is_same = torch.equal(first.read(name), last.read(name))
            assert is_same == is_frozen(unit_of(name), freeze), name


@pytest.mark.parametrize("micro_batch", [2, 4])
def test_losses_do_not_depend_on_the_micro_batch(micro_batch, config, reference, pool, tmp_path):
    lines = pool.run(jobs.train, at(config, tmp_path, micro_batch=micro_batch), ranks=1)[0]
    assert_same(lines, reference[1])


@pytest.mark.parametrize(
    ("saved_at", "resumed_at"),
    [
        ("tp2 pp2 sp", "dp2"),
        pytest.param("dp2", "pp2 interleaved cut in the tower", marks=pytest.mark.slow),
        pytest.param("pp2 cut in the tower", "tp2 dp2 sp", marks=pytest.mark.slow),
        pytest.param("tp2 pp2 sp interleaved", "pp2", marks=pytest.mark.slow),
    ],
)
def test_a_run_saved_in_one_layout_goes_on_in_another(saved_at, resumed_at, config, reference, pool, tmp_path):
    first = at(config, tmp_path, LAYOUTS[saved_at])
    pool.run(jobs.train_until, first, 10, ranks=RANKS[saved_at])
    lines = pool.run(jobs.train, at(config, tmp_path, LAYOUTS[resumed_at]), ranks=RANKS[resumed_at])[0]
    assert_same(lines, reference[1])


def test_behind_frozen_parts_no_gradient_is_computed_or_sent(config, pool, tmp_path):
    layout = Parallel(pp=2, layout="Vvvv|PEtttL")
    short = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, eval_path=None),
        train=dataclasses.replace(config.train, steps=2, eval_every_steps=0),
    )
    sent = pool.run(jobs.backward_messages, at(short, tmp_path / "frozen", layout, freeze=("vision",)), ranks=2)
    assert sent == [[], [1] * 8]
    sent = pool.run(jobs.backward_messages, at(short, tmp_path / "trained", layout), ranks=2)
    assert len(sent[1]) == 8 and min(sent[1]) > 100
    for cut, is_needed in (("Vvv|vPEtttL", False), ("Vvvv|PEtttL", True)):
        part = at(short, tmp_path / cut, Parallel(pp=2, layout=cut), freeze=("vision[:2]",))
        sent = pool.run(jobs.backward_messages, part, ranks=2)
        assert len(sent[1]) == 8 and (min(sent[1]) > 100 if is_needed else set(sent[1]) == {1})


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("cut", ["VvvvPEtttL", "Vv|vvPEtttL", "Vvv|vPEtttL", "Vvvv|PEtttL"])
def test_layers_behind_a_frozen_beginning_get_the_gradients_they_would_get(cut, recompute, config, pool, tmp_path):
    """The tower trained from its layer 2, cut in front of, at and behind that layer."""
    ranks = cut.count("|") + 1
    parallel = Parallel(pp=ranks, layout=cut)
    run = at(config, tmp_path, parallel, recompute=recompute)
    [expected] = pool.run(jobs.gradients, at(config, tmp_path), ranks=1)
    frozen = dataclasses.replace(run, train=dataclasses.replace(run.train, freeze=("vision[:2]",)))
    found = {name: grad for rank in pool.run(jobs.gradients, frozen, ranks=ranks) for name, grad in rank.items()}
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        if is_frozen(unit_of(name), ("vision[:2]",)):
            assert grad is None, name
        else:
            torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    assert sum(grad is None for grad in found.values()) == 12 * 2 + 5


@pytest.mark.slow
def test_a_run_with_several_gradient_buckets_is_saved_and_goes_on(config, reference, pool, tmp_path):
    parallel = LAYOUTS["dp2"]
    lines, buckets = pool.run(jobs.train_in_buckets, at(config, tmp_path, parallel), ranks=2)[0]
    assert buckets > 2
    assert_same(lines, reference[1])
    jobs.drop_after(tmp_path, 10)
    lines = pool.run(jobs.train, at(config, tmp_path, LAYOUTS["tp2 pp2 sp"]), ranks=4)[0]
    assert_same(lines, reference[1])


@pytest.mark.soak
@pytest.mark.parametrize(
    ("parallel", "ranks"),
    [
        (Parallel(pp=2, layout="Vv|vvPE|t|ttL"), 2),
        (Parallel(pp=2, virtual_stages=3), 2),
        (Parallel(tp=2, pp=2, virtual_stages=2, sequence_parallel=True), 4),
    ],
    ids=["pp2 x 2", "pp2 x 3", "tp2 pp2 x 2 sp"],
)
def test_200_interleaved_steps_are_all_the_same(parallel, ranks, config, pool, tmp_path):
    results = pool.run(jobs.repeat, at(config, tmp_path, parallel, global_batch=8), 200, ranks=ranks)
    assert all(len(set(of_rank)) == 1 for of_rank in results)
    assert results[0][0][0] > 1.0


def test_kept_tensors_and_tokenizer_outlive_the_checkpoints_they_came_from(config, golden, pool, tmp_path):
    """With one checkpoint kept and a resume in between, the export is still complete."""
    hf = golden / "llava/hf_native/hf"
    source = tmp_path / "hf"
    shutil.copytree(hf, source)
    (source / "tokenizer_config.json").write_text("{}")
    import_hf(source, None, [family("llava")], tmp_path / "start")
    short = dataclasses.replace(
        at(config, tmp_path / "run", steps=4, eval_every_steps=0),
        model=Model(family="llava", pretrained=str(tmp_path / "start")),
        data=dataclasses.replace(config.data, eval_path=None),
        checkpoint=Checkpoint(dir=str(tmp_path / "run"), every_steps=1, keep_last=1),
    )
    pool.run(jobs.train, short, ranks=1)
    longer = dataclasses.replace(short, train=dataclasses.replace(short.train, steps=7))
    pool.run(jobs.train, longer, ranks=1)
    assert [path.name for path in tmp_path.glob("run/step_*")] == ["step_00000007"]
    export_hf(tmp_path / "run", family("llava"), tmp_path / "back")
    assert load_file(tmp_path / "back/model.safetensors").keys() == load_file(hf / "model.safetensors").keys()
    assert (tmp_path / "back/tokenizer_config.json").exists()
