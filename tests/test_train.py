"""Bad input through the command line: one message that names the field or file and the remedy, a status that is not
zero, nothing half-written; under torchrun the message is printed once."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megamm.batch import IMAGE
from megamm.data.indexed import Writer
from megamm.data.tokenizer_files import tokenizer_hash
from megamm.registry import FAMILIES
from megamm.testing.data import random_dataset
from megamm.train import main
from megamm.weights.convert import import_hf

ROOT = Path(__file__).parents[1]
RECIPE = """
from megamm.config import Checkpoint, Config, Data, Model, Optim, Train

def config():
    return Config(
        model=Model(family="llava", pretrained="start", config="config.json"),
        data=Data(path="set", max_tokens=40, num_workers=0),
        optim=Optim(lr=1e-3),
        train=Train(global_batch=4, micro_batch=2, steps=2, precision="fp32", backend="cpu"),
        checkpoint=Checkpoint(dir="run"),
    )
"""


@pytest.fixture(scope="module")
def made(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe and all that it names, in one directory; the data was made with the checkpoint's tokenizer."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "recipe.py").write_text(RECIPE)
    hf = golden / "llava/hf_native/hf"
    (folder / "config.json").write_text((hf / "config.json").read_text())
    import_hf(hf, None, list(FAMILIES.values()), folder / "start")
    (folder / "start/hf_files/tokenizer.model").write_bytes(b"pieces")
    random_dataset(folder / "set", num_samples=9, vocab_size=120)
    edit_json("set.json", tokenizer={"file": "tokenizer.model", "hash": tokenizer_hash(folder / "start/hf_files")})(
        folder
    )
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to break, made the working directory."""
    copied = tmp_path / "work"
    subprocess.run(["cp", "-r", made, copied], check=True)
    monkeypatch.chdir(copied)
    return copied


def edit_json(name: str, **changes: object) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))

    return edit


def edit_recipe(old: str, new: str) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        text = (folder / "recipe.py").read_text()
        assert old in text
        (folder / "recipe.py").write_text(text.replace(old, new))

    return edit


def run_of_another_model(folder: Path) -> None:
    subprocess.run(["cp", "-r", folder / "start", folder / "run/step_00000001"], check=True)
    info = json.loads((folder / "start/megamm.json").read_text())
    info["hf_config"]["text_config"]["num_hidden_layers"] = 7
    (folder / "run/step_00000001/megamm.json").write_text(json.dumps(info))


def shorter_bin(folder: Path) -> None:
    """PREFIX.json agrees with both files, and these do not with each other."""
    cut("set.bin")(folder)
    edit_json("set.json", bin_bytes=(folder / "set.bin").stat().st_size)(folder)


def cut(name: str) -> Callable[[Path], object]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - 4)


def remove(pattern: str) -> Callable[[Path], object]:
    return lambda folder: [subprocess.run(["rm", "-r", path], check=True) for path in folder.glob(pattern)]


def nothing(folder: Path) -> None:
    pass


BAD: dict[str, tuple[list[str], Callable[[Path], object], list[str]]] = {
    "packing and grouping": (
        ["--data.packing", "--data.group-by-modality-length"],
        nothing,
        ["data.group_by_modality_length=True saves padding, of which data.packing=True leaves none"],
    ),
    "packs of another dataset": (
        ["--data.packing"],
        lambda folder: (folder / "set.packs-40.npz").write_bytes(b"nothing"),
        ["data.packing: set.packs-40.npz: not readable", "data_tools/pack.py"],
    ),
    "data without samples": (
        ["--data.packing", "--data.eval-path", "set"],
        lambda folder: random_dataset(folder / "set", num_samples=0, vocab_size=120),
        [
            "data.path=set holds no sample; give another data.path",
            "data.eval_path=set holds no sample; give another data.eval_path",
        ],
    ),
    "heads and vocabulary": (
        ["--parallel.tp", "3"],
        nothing,
        [
            "parallel.tp=3 does not fit",
            "attention heads, not divisible",
            "rows in the vocabulary",
            "legal for this model: 1, 2",
        ],
    ),
    "layers": (["--parallel.pp", "99"], nothing, ["parallel.pp=99 cuts the model into 99 stages", "legal is 1 to"]),
    "cut": (["--parallel.layout", "VvvPEtL"], nothing, ["parallel.layout=VvvPEtL", "a legal cut of this model"]),
    "world size": (["--parallel.pp", "2"], nothing, ["must divide the world size of 1 ranks: legal products are 1"]),
    "recipe absent": (["absent.py"], nothing, ["recipe absent.py: there is no such file"]),
    "recipe raises": ([], edit_recipe("lr=1e-3", "lr=1 / 0"), ["recipe.py, line 8: ZeroDivisionError"]),
    "recipe misspelt": ([], edit_recipe("lr=", "lrr="), ["recipe.py, line 8: TypeError", "did you mean lr?"]),
    "family": (["--model.family", "lava"], nothing, ["model.family 'lava' is unknown; megamm has: llava"]),
    "no start": (
        ["--model.pretrained", "absent"],
        nothing,
        ["model.pretrained=absent: there is no", "hf_to_megatron.py"],
    ),
    "no start, no sizes": (
        ["--model.pretrained", "absent", "--model.config", "None"],
        nothing,
        ["model.pretrained=absent: there is no", "give model.config"],
    ),
    "start is none": (["--model.pretrained", "."], nothing, [". is neither a megamm checkpoint"]),
    "start of another family": (
        [],
        edit_json("start/megamm.json", family="owl"),
        ["model.pretrained=start is of family owl, model.family is llava"],
    ),
    "no config.json": (
        ["--model.pretrained", "None", "--model.config", "absent.json"],
        nothing,
        ["model.config=absent.json is not a readable config.json"],
    ),
    "config.json of another family": (
        ["--model.pretrained", "None"],
        edit_json("config.json", model_type="bert"),
        ["config.json is not a llava"],
    ),
    "no data": (["--data.path", "absent"], nothing, ["data.path: absent.json: not found", "Preprocess"]),
    "no data to evaluate": (["--data.eval-path", "absent"], nothing, ["data.eval_path: absent.json: not found"]),
    "bin cut": ([], cut("set.bin"), ["data.path: set.bin: has", "preprocess again"]),
    "idx cut": ([], cut("set.idx"), ["data.path: set.idx: has", "preprocess again"]),
    "idx of another bin": (
        [],
        shorter_bin,
        ["data.path: set.idx: offsets do not fit the .bin file", "preprocess again"],
    ),
    "data of another family": ([], edit_json("set.json", family="owl"), ["data.path=set", "--family llava"]),
    "another tokenizer": (
        [],
        edit_json("set.json", tokenizer={"file": "tokenizer.json", "hash": "0123456789abcdef"}),
        ["data.path=set was preprocessed with another tokenizer (0123456789ab)", "start/hf_files"],
    ),
    "run of another model": ([], run_of_another_model, ["checkpoint.dir: run/step_00000001", "differs in text_config"]),
    "run directory": (["--checkpoint.dir", "set.json/run"], nothing, ["checkpoint.dir=set.json/run cannot be written"]),
    "no GPU": (["--train.backend", "gpu"], nothing, ["gpu"]),  # or, after another test: this process runs on cpu
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_clear_message(kind: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options, damage, expected = BAD[kind]
    (folder / "run").mkdir()
    damage(folder)
    before = sorted(folder.rglob("*"))
    recipe = [] if options[:1] == ["absent.py"] else ["recipe.py"]
    assert main([*recipe, *options]) == 1
    message = capfd.readouterr().err
    assert message.count("error: ") == 1 and "Traceback" not in message
    for text in expected:
        assert text in message
    assert [path for path in sorted(folder.rglob("*")) if "__pycache__" not in str(path)] == before


def test_everything_that_is_wrong_is_told_at_once(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--parallel.tp", "3", "--parallel.pp", "99", "--train.micro-batch", "3", "--data.path", "absent"]
    options += ["--model.pretrained", "absent", "--checkpoint.dir", "set.json", "--optim.warmup", "2"]
    assert main(["recipe.py", *options]) == 1
    message = capfd.readouterr().err
    for name in (
        "tp=3 does",
        "pp=99",
        "= 297 must divide",
        "optim.warmup",
        "data.path",
        "model.pretrained",
        "checkpoint.dir",
    ):
        assert name in message
    assert message.startswith("error: 7 problems\n- ")


@pytest.mark.parametrize(
    ("options", "nearest"),
    [(["--paralel.tp", "2"], "--parallel.tp"), (["--train.global_bacth", "2"], "--train.global-batch")],
)
def test_a_misspelt_option_is_told_with_the_nearest(
    options: list[str], nearest: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["recipe.py", *options])
    assert stop.value.code == 2
    assert nearest in capfd.readouterr().err


def test_a_dry_run_needs_no_files(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--data.path", "absent", "--model.pretrained", "absent", "--checkpoint.dir", "set.json"]
    assert main(["recipe.py", "--dry-run", *options]) == 0
    assert "samples unknown" in capfd.readouterr().out


def test_a_dry_run_counts_sequences_where_samples_are_packed(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--data.packing", "--data.max-tokens", "4096", "--train.global-batch", "2", "--train.epochs", "6"]
    assert main(["recipe.py", "--dry-run", *options, "--train.steps", "None"]) == 0
    printed = " ".join(capfd.readouterr().out.split())
    assert "2 sequences per step = 2 per micro-batch" in printed
    assert "samples 9 in 1 sequences; steps 3; at most 4096 tokens per sequence" in printed


def train(folder: Path, *options: str, ranks: int = 0) -> subprocess.CompletedProcess[str]:
    launcher = [ROOT / "examples/launch/torchrun.py", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    return subprocess.run(
        [sys.executable, *launcher, "-m", "megamm.train", "recipe.py", *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_the_status_reaches_the_shell(folder: Path) -> None:
    done = train(folder, "--data.path", "absent")
    assert done.returncode == 1
    assert done.stderr.startswith("error: data.path: absent.json: not found")
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [(["--data.path", "absent"], "error: data.path: absent.json"), (["--paralel.tp", "2"], "--parallel.tp")],
)
def test_ranks_that_find_the_same_say_it_once(options: list[str], message: str, folder: Path) -> None:
    done = train(folder, "--train.global-batch", "6", *options, ranks=3)
    assert done.returncode in (1, 2)
    assert done.stderr.count(message) == 1 and "Traceback" not in done.stderr
    assert not (folder / "run").exists()


@pytest.mark.slow
def test_a_rank_that_fails_alone_says_it(folder: Path) -> None:
    """With dp 2 and one sample per micro-batch, only rank 1 reads the picture that is broken."""
    with Writer("broken") as writer:
        for picture in (0, 1):
            ids = np.array([3, IMAGE, 5] if picture else [3, 4, 5], np.int32)
            writer.add(ids, [b"no picture"] * picture, np.array([[2, 3]], np.int32))
        writer.finish({"family": "llava"})
    options = ["--data.path", "broken", "--data.no-shuffle", "--train.global-batch", "2", "--train.micro-batch", "1"]
    done = train(folder, *options, ranks=2)
    assert done.returncode != 0
    assert done.stderr.count("error: broken: document 1, picture 0: the picture is empty") == 1


@pytest.mark.slow
def test_a_checkpoint_or_data_without_tokenizer_are_taken_with_a_line(folder: Path) -> None:
    (folder / "start/hf_files/tokenizer.model").unlink()
    done = train(folder)
    assert done.returncode == 0, done.stderr
    assert "start has no tokenizer: not checked that the ids of the data are those of the model" in done.stderr
