"""Imp on Qwen1.5-1.8B, stage 1: that of Phi-2 with another decoder. The authors' numbers are the same for all."""

from pathlib import Path

from megamm.config import Config
from megamm.config.load import load_recipe

HERE = Path(__file__).parent


def config() -> Config:
    config = load_recipe(HERE / "pretrain.py")
    config.model.pretrained = "weights/imp-qwen1.5-start"
    config.model.config = str(HERE / "config-qwen1_5.json")
    config.data.path = "data/imp-qwen1.5-pretrain558k"
    config.data.max_tokens = 2560  # tokenizer_model_max_length of the released config.json
    config.checkpoint.dir = "runs/imp-qwen1.5-pretrain"
    return config
