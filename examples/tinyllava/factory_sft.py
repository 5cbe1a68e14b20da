"""TinyLLaVA_Factory, stage 2: instruction tuning on the 665k mix; the tower is frozen.

Numbers: the authors' scripts/train/finetune.sh and scripts/train/qwen2/finetune_qwen2.sh.
"""

from pathlib import Path

from megamm.config import Config
from megamm.config.load import load_recipe


def config() -> Config:
    config = load_recipe(Path(__file__).with_name("factory_pretrain.py"))
    config.model.pretrained = "weights/tinyllava-factory-pretrained"
    config.data.path = "data/tinyllava-factory-sft665k"
    config.data.group_by_modality_length = True
    config.optim.lr = 2e-5
    config.train.global_batch = 128
    config.train.micro_batch = 4
    config.train.freeze = ("vision",)
    config.checkpoint.dir = "runs/tinyllava-factory-sft"
    return config
