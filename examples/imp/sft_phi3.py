"""Imp on Phi-3-mini, stage 2: that of Phi-2 with another decoder, pictures padded to a square."""

from pathlib import Path

from megamm.config import Config
from megamm.config.load import load_recipe

HERE = Path(__file__).parent


def config() -> Config:
    config = load_recipe(HERE / "sft.py")
    config.model.pretrained = "weights/imp-phi3-pretrained"
    config.model.config = str(HERE / "config-phi3.json")
    config.data.path = "data/imp-phi3-sft665k"
    config.data.max_tokens = 2560  # tokenizer_model_max_length of the released config.json
    config.data.aspect = "pad"  # image_aspect_ratio of the released config.json
    config.checkpoint.dir = "runs/imp-phi3-sft"
    return config
