"""What the ranks of the training tests run."""

import json
import shutil
from pathlib import Path

from megamm import backend
from megamm.config.check import check
from megamm.config.schema import Config
from megamm.parallel import groups
from megamm.training.loop import run
from megamm.training.meter import LOG
from megamm.training.setup import plan


def train(config: Config) -> list[dict]:
    """A whole run as megamm.train does it -> the lines of its log, on every rank."""
    check(config, groups.world_size())
    backend.start("cpu")
    found = plan(config, groups.world_size())
    groups.start_distributed()
    run(config, found, groups.start(config.parallel, config.train.seed))
    return [json.loads(line) for line in (Path(config.checkpoint.dir) / LOG).read_text().splitlines()]


def train_until(config: Config, step: int) -> None:
    """A run that ended behind the checkpoint of `step`: train, then drop what came later."""
    train(config)
    if groups.is_first():
        for path in Path(config.checkpoint.dir).glob("step_*"):
            if int(path.name[5:]) > step:
                shutil.rmtree(path)
