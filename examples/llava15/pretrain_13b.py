"""LLaVA-1.5-13B, stage 1: the 7B's with another decoder. The paper's numbers are the same for both sizes."""

from pathlib import Path

from megamm.config import Config
from megamm.config.load import load_recipe

HERE = Path(__file__).parent


def config() -> Config:
    config = load_recipe(HERE / "pretrain.py")
    config.model.pretrained = "weights/llava15-13b-start"
    config.model.config = str(HERE / "config-13b.json")
    config.checkpoint.dir = "runs/llava15-13b-pretrain"
    return config
