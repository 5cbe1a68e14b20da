"""The VW-LMM recipes: LLaVA-1.5 numbers, what each stage trains and minimises, and run.sh from weights to export."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megamm.config.check import find_problems
from megamm.config.load import load_recipe
from megamm.weights.hf import HfSource
from tests.examples import recipes
from tests.examples.recipes import EXAMPLES, dry_run, run

FOLDER = EXAMPLES / "vw_lmm"
STAGES = {
    # recipe: freeze, weights of text and words, teacher
    "pretrain": (("vision", "llm", "words"), (1.0, 0.0), "words"),
    "sft": (("vision", "words"), (1.0, 0.0), "words"),
    "words": (("vision", "projector", "llm"), (0.0, 1.0), "llm"),
    "joint": (("vision",), (1.0, 1.0), "words"),
    "joint_pif": (("vision",), (1.0, 1.0), "words"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_recipe_trains_and_minimises_what_its_stage_does(stage: str) -> None:
    config = load_recipe(FOLDER / f"{stage}.py")
    assert not find_problems(config, world_size=8)
    first = stage == "pretrain"
    assert (config.optim.lr, config.train.global_batch) == ((1e-3, 256) if first else (2e-5, 128))
    assert (config.optim.schedule, config.optim.warmup, config.optim.weight_decay) == ("cosine", 0.03, 0.0)
    assert (config.train.epochs, config.data.max_tokens, config.train.precision) == (1.0, 2048, "bf16")
    assert config.data.aspect == ("square" if first else "pad")
    loss = config.loss
    assert (config.train.freeze, (loss.lm_weight, loss.vm_weight), loss.teacher) == STAGES[stage]
    assert config.model.family == ("vw_lmm_pif" if stage == "joint_pif" else "vw_lmm")


def test_the_stages_do_not_share_a_folder() -> None:
    configs = [load_recipe(path) for path in sorted(FOLDER.glob("*.py"))]
    assert len({config.checkpoint.dir for config in configs}) == len({c.model.pretrained for c in configs}) == 5


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("sizes", ["config-7b.json", "config-mistral-7b.json"])
def test_a_dry_run_needs_no_weights(stage: str, sizes: str, tmp_path: Path, monkeypatch, capsys) -> None:
    assert dry_run(FOLDER / f"{stage}.py", tmp_path, monkeypatch, "--model.config", str(FOLDER / sizes)) == 0
    assert "8 ranks" in capsys.readouterr().out


@pytest.mark.slow
def test_the_whole_way_from_weights_and_conversations_to_both_exports(tmp_path: Path) -> None:
    """Two steps of each stage, tiny, over two pipeline stages; the second variant goes on behind the first."""
    inputs = recipes.write_inputs(tmp_path, recipes.save_llama, recipes.save_clip)
    out, short = inputs["output"], recipes.short(max_tokens=256)
    start = load_file(inputs["llm"] / "model.safetensors")["lm_head.weight"]
    for variant, last in (("vw", "joint"), ("pif", "joint_pif")):
        done = run("vw_lmm", inputs, "--variant", variant, "--", *short)
        assert done.returncode == 0, done.stderr
        assert ("nothing to do" in done.stderr) == (variant == "pif")
        for stage in ("pretrain", "sft", "words", last):
            lines = (out / stage / "log.jsonl").read_text().splitlines()
            assert len(lines) == 2 and '"loss_vm": ' in lines[0]
        source = HfSource(out / "export")
        head, llm_head = source.read("vm_head.weight"), source.read("lm_head.weight")
        assert not torch.equal(head, start) and not torch.equal(llm_head, start) and not torch.equal(head, llm_head)
        assert (head - start).abs().max() < 1e-3
        (out / "export").rename(out / f"export-{variant}")


def test_run_refuses_variants_that_there_are_not(tmp_path: Path) -> None:
    inputs = recipes.empty_inputs(tmp_path)
    for options, message in (
        (["--variant", "vf"], "--variant vf: there are vw and pif"),
        (["--template", "v2"], "--template v2: there are v1 and mistral"),
        (["--sise", "7b"], "--sise: no such option; there are --llm --tower"),
    ):
        done = run("vw_lmm", inputs, *options)
        assert done.returncode == 1 and f"error: {message}" in done.stderr
