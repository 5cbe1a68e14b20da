"""TinyLLaVA, stage 3 of the share recipe: the base recipe's tuning on ShareGPT4V's mix of 665k conversations."""

from pathlib import Path

from megamm.config import Config
from megamm.config.load import load_recipe


def config() -> Config:
    config = load_recipe(Path(__file__).with_name("sft.py"))
    config.model.pretrained = "weights/tinyllava-share-pretrained"
    config.data.path = "data/tinyllava-share-sft665k"
    config.checkpoint.dir = "runs/tinyllava-share-sft"
    return config
