"""mPLUG-Owl3-7B, stage 1: image-text pairs; the projector and what the llm has for visual tokens only are trained.

Numbers: arXiv 2408.04840, section 4. What is not published and what differs stands in README.md beside this file.
"""

from pathlib import Path

from megamm.config import Checkpoint, Config, Data, Model, Optim, Parallel, Train


def config() -> Config:
    return Config(
        model=Model(
            family="mplug_owl3",
            pretrained="weights/mplug-owl3-start",
            config=str(Path(__file__).with_name("config-7b.json")),
        ),
        data=Data(path="data/mplug-owl3-pretrain", max_tokens=768, aspect="square"),
        parallel=Parallel(tp=4, pp=2, sequence_parallel=True),
        optim=Optim(lr=1e-3, min_lr=1e-5, schedule="cosine", warmup=0.03, weight_decay=0.0),
        train=Train(steps=20_000, global_batch=2048, micro_batch=16, freeze=("vision", "llm.text"), recompute="full"),
        checkpoint=Checkpoint(dir="runs/mplug-owl3-pretrain", every_steps=500),
    )
