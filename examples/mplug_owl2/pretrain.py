"""mPLUG-Owl2-7B, stage 1: tower, abstractor and the visual way of the llm learn captions; the text way is frozen.

Numbers: arXiv 2311.04257 (hyper-parameter table of the appendix), for about 400 million pairs. What is not published
and what differs stands in README.md beside this file. Pictures have the 224 pixels of the start's tower; config-7b.json
counts only where there is no start.
"""

from pathlib import Path

from megamm.config import Checkpoint, Config, Data, Model, Optim, Parallel, Train


def config() -> Config:
    return Config(
        model=Model(
            family="mplug_owl2",
            pretrained="weights/mplug-owl2-start",
            config=str(Path(__file__).with_name("config-7b.json")),
        ),
        # The published length of 256 counts text only; one picture makes 65 visual tokens.
        data=Data(path="data/mplug-owl2-pretrain", max_tokens=321, aspect="stretch"),
        parallel=Parallel(tp=2, pp=2, sequence_parallel=True),
        optim=Optim(
            lr=1e-4, schedule="cosine", warmup=1000 / 42_500, beta2=0.98, eps=1e-6, weight_decay=0.05, clip_norm=1.0
        ),
        train=Train(steps=42_500, global_batch=8192, micro_batch=32, freeze=("llm.text",), recompute="full"),
        checkpoint=Checkpoint(dir="runs/mplug-owl2-pretrain", every_steps=500),
    )
