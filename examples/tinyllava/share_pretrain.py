"""TinyLLaVA, stage 2 of the share recipe: 1.246 million ShareGPT4V captions; llm, projector and the tower from its
layer 12 upwards are trained, the layers before it and the embedding are frozen.

Numbers: arXiv 2402.14289; the authors' switch is `tune_vit_from_layer`.
"""

from pathlib import Path

from megamm.config import Config
from megamm.config.load import load_recipe


def config() -> Config:
    config = load_recipe(Path(__file__).with_name("pretrain.py"))
    config.model.pretrained = "weights/tinyllava-pretrained"
    config.data.path = "data/tinyllava-share1246k"
    config.optim.lr = 2e-5
    config.train.micro_batch = 4
    config.train.freeze = ("vision[:12]",)
    config.checkpoint.dir = "runs/tinyllava-share-pretrain"
    return config
