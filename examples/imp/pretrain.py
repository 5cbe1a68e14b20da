"""Imp on Phi-2, stage 1: align the projector on 558k captions; tower and llm are frozen.

Numbers: arXiv 2405.12107 and the authors' training scripts.
"""

from pathlib import Path

from megamm.config import Checkpoint, Config, Data, Model, Optim, Parallel, Train


def config() -> Config:
    return Config(
        model=Model(
            family="imp",
            pretrained="weights/imp-phi2-start",
            config=str(Path(__file__).with_name("config-phi2.json")),
        ),
        data=Data(path="data/imp-phi2-pretrain558k", max_tokens=3072, aspect="square"),
        parallel=Parallel(tp=2, sequence_parallel=True),
        optim=Optim(lr=1e-3, schedule="cosine", warmup=0.03, weight_decay=0.0),
        train=Train(epochs=1, global_batch=256, micro_batch=8, freeze=("vision", "llm"), recompute="full"),
        checkpoint=Checkpoint(dir="runs/imp-phi2-pretrain", every_steps=500),
    )
