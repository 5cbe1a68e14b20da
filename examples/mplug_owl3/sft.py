"""mPLUG-Owl3-7B, stage 3: instruction tuning; projector and llm are trained, the tower is frozen.

Numbers: arXiv 2408.04840, section 4. What is not published and what differs stands in README.md beside this file.
"""

from pathlib import Path

from megamm.config import Checkpoint, Config, Data, Model, Optim, Parallel, Train


def config() -> Config:
    return Config(
        model=Model(
            family="mplug_owl3",
            pretrained="weights/mplug-owl3-interleaved",
            config=str(Path(__file__).with_name("config-7b.json")),
        ),
        data=Data(path="data/mplug-owl3-sft", max_tokens=4096, aspect="square"),
        parallel=Parallel(tp=4, pp=2, sequence_parallel=True),
        optim=Optim(lr=2e-5, min_lr=1e-7, schedule="cosine", warmup=0.03, weight_decay=0.0),
        train=Train(steps=11_000, global_batch=1024, micro_batch=1, freeze=("vision",), recompute="full"),
        checkpoint=Checkpoint(dir="runs/mplug-owl3-sft", every_steps=500),
    )
