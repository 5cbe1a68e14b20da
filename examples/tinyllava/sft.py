"""TinyLLaVA, last stage of the base recipe: instruction tuning on the 665k mix; the tower is frozen.

Numbers: the authors' scripts/tiny_llava/finetune.sh (Phi-2 and SigLIP).
"""

from pathlib import Path

from megamm.config import Config
from megamm.config.load import load_recipe


def config() -> Config:
    config = load_recipe(Path(__file__).with_name("pretrain.py"))
    config.model.pretrained = "weights/tinyllava-pretrained"
    config.data.path = "data/tinyllava-sft665k"
    config.data.aspect = "pad"
    config.data.group_by_modality_length = True
    config.optim.lr = 2e-5
    config.train.global_batch = 128
    config.train.micro_batch = 4
    config.train.freeze = ("vision",)
    config.checkpoint.dir = "runs/tinyllava-sft"
    return config
