"""Recipes, the command line, and the configuration as JSON."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamm.config import Checkpoint, Config, Data, Model, Optim, Parallel, Train
from megamm.config.load import freeze, load_recipe, parse, thaw
from megamm.errors import ConfigError, MegammError

RECIPE = """
from megamm.config import Checkpoint, Config, Data, Model, Optim, Train

def config():
    return Config(
        model=Model(family="llava", config="config.json"),
        data=Data(path="data/x"),
        optim=Optim(lr=1e-3),
        train=Train(global_batch=8, freeze=("vision",)),
        checkpoint=Checkpoint(dir="runs/x"),
    )
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.py"
    path.write_text(RECIPE)
    return path


def write(tmp_path: Path, old: str, new: str) -> Path:
    assert old in RECIPE
    path = tmp_path / "bad.py"
    path.write_text(RECIPE.replace(old, new))
    return path


configs = st.builds(
    Config,
    model=st.builds(Model, family=st.text(), pretrained=st.none() | st.text()),
    data=st.builds(Data, path=st.text(), shuffle=st.booleans()),
    optim=st.builds(Optim, lr=st.floats(allow_nan=False), vision_lr=st.none() | st.floats(allow_nan=False)),
    train=st.builds(Train, global_batch=st.integers(), steps=st.none() | st.integers()),
    checkpoint=st.builds(Checkpoint, dir=st.text()),
    parallel=st.builds(Parallel, tp=st.integers(), layout=st.text()),
)


@given(configs)
def test_frozen_configurations_thaw_to_the_same(config: Config) -> None:
    assert thaw(freeze(config)) == config


def test_a_frozen_configuration_is_a_recipe(recipe: Path, tmp_path: Path) -> None:
    config = load_recipe(recipe)
    frozen = tmp_path / "config.json"
    frozen.write_text(freeze(config))
    assert load_recipe(frozen) == config
    assert config.train.freeze == ("vision",)


def test_the_command_line_overrides_the_recipe(recipe: Path) -> None:
    line = ["--parallel.tp", "2", "--train.global-batch=16", "--train.freeze", "vision", "llm", "--data.no-shuffle"]
    config, options = parse([str(recipe), *line])
    assert (config.parallel.tp, config.train.global_batch, config.train.freeze) == (2, 16, ("vision", "llm"))
    assert not config.data.shuffle
    assert config.optim.lr == 1e-3
    assert (options.recipe, options.dry_run) == (str(recipe), False)
    assert parse([str(recipe), "--dry-run", "--train.freeze"])[0].train.freeze == ()
    assert parse([str(recipe), "--dry-run"])[1].dry_run


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--paralel.tp", "2"], "--parallel.tp"),
        (["--train.global_bacth", "2"], "--train.global-batch"),
        (["--parallel.tp", "two"], "--parallel.tp"),
        (["--train.precision", "fp9"], "bf16"),
        (["--optim.lr"], "--optim.lr"),
    ],
)
def test_a_wrong_option_is_told_with_the_nearest_name(
    recipe: Path, options: list[str], expected: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse([str(recipe), *options])
    assert stop.value.code == 2
    assert expected in capfd.readouterr().err


def test_only_rank_0_prints(recipe: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        parse([str(recipe), "--paralel.tp", "2"])
    assert capfd.readouterr() == ("", "")


def test_help_lists_every_option_with_the_recipes_value(recipe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse([str(recipe), "--help"])
    assert stop.value.code == 0
    text = capfd.readouterr().out
    assert f"usage: python -m megamm.train {recipe}" in text  # which every message on a wrong option refers to
    assert "--train.global-batch INT" in text
    assert "(default: 8)" in text


def test_the_recipe_comes_first(capfd: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["--dry-run", "recipe.py"]):
        with pytest.raises(MegammError, match="the recipe comes first"):
            parse(argv)
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    assert stop.value.code == 0
    assert "RECIPE.py" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("lr=1e-3", "lr=1 / 0", "bad.py, line 8: ZeroDivisionError: division by zero"),
        ("lr=1e-3", "lr=oops", "bad.py, line 8: NameError: name 'oops' is not defined"),
        ("lr=1e-3", "lr=", "bad.py, line 8: SyntaxError"),
        ("global_batch", "global_bach", "line 9: TypeError.*did you mean global_batch"),
        ("import Checkpoint,", "import Checkpoints,", "bad.py, line 2: ImportError"),
        ("def config", "def konfig", "must define config"),
        ("return Config(", "return dict(", "must return a megamm.config.Config, not dict"),
        ("global_batch=8", "global_batch='8'", "train.global_batch must be a whole number, not '8'"),
        ("global_batch=8", "global_batch=True", "train.global_batch must be a whole number, not True"),
        ('("vision",)', '"vision"', "train.freeze must be a list"),
        ("lr=1e-3", "lr=1e-3, schedule='cosin'", "optim.schedule must be one of cosine, linear, constant, not 'cosin'"),
    ],
)
def test_a_bad_recipe_is_explained(tmp_path: Path, old: str, new: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        load_recipe(write(tmp_path, old, new))


def test_a_bad_json_is_explained_at_once(recipe: Path) -> None:
    text = freeze(load_recipe(recipe))
    bad = text.replace('"micro_batch"', '"micro_bach"').replace('"lr": 0.001', '"lr": "fast"').replace('"dir"', '"dri"')
    with pytest.raises(ConfigError) as error:
        thaw(bad, source="run.json")
    assert error.value.problems == [
        "run.json: optim.lr must be a number, not 'fast'",
        "run.json: train.micro_bach does not exist; did you mean micro_batch?",
        "run.json: checkpoint.dri does not exist; did you mean dir?",
        "run.json: checkpoint.dir is missing",
    ]
    with pytest.raises(ConfigError, match="run.json, line 1, is not JSON"):
        thaw("config = 3", source="run.json")
    with pytest.raises(ConfigError, match="the configuration must be a group of fields"):
        thaw("[]")


@pytest.mark.parametrize(("name", "expected"), [("absent.py", "no such file"), ("recipe.yaml", "is a .py file")])
def test_what_is_no_recipe_is_refused(tmp_path: Path, name: str, expected: str) -> None:
    (tmp_path / "recipe.yaml").write_text("lr: 1")
    with pytest.raises(ConfigError, match=expected):
        load_recipe(tmp_path / name)
