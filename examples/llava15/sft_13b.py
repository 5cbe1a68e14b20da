"""LLaVA-1.5-13B, stage 2: the 7B's with another decoder. The paper's numbers are the same for both sizes."""

from pathlib import Path

from megamm.config import Config
from megamm.config.load import load_recipe

HERE = Path(__file__).parent


def config() -> Config:
    config = load_recipe(HERE / "sft.py")
    config.model.pretrained = "weights/llava15-13b-pretrained"
    config.model.config = str(HERE / "config-13b.json")
    config.checkpoint.dir = "runs/llava15-13b-sft"
    return config
