"""VW-LMM on Vicuna-7B, stage 4 with pseudo image features: the llm reads mean embeddings under the visual words.

What is published, and what is not, is the same as without them.
"""

from pathlib import Path

from megamm.config import Config
from megamm.config.load import load_recipe


def config() -> Config:
    config = load_recipe(Path(__file__).with_name("joint.py"))
    config.model.family = "vw_lmm_pif"
    config.model.pretrained = "weights/vw-lmm-pif-words"
    config.data.path = "data/vw-lmm-pif-sft"
    config.checkpoint.dir = "runs/vw-lmm-pif-joint"
    return config
