"""LLaVA-1.5-7B, stage 1: align the projector on 558k captions; tower and llm are frozen.

Numbers: arXiv 2310.03744 (hyper-parameter table of the appendix) and the authors' scripts/v1_5/pretrain.sh.
"""

from pathlib import Path

from megamm.config import Checkpoint, Config, Data, Model, Optim, Parallel, Train


def config() -> Config:
    return Config(
        model=Model(
            family="llava",
            pretrained="weights/llava15-start",
            config=str(Path(__file__).with_name("config-7b.json")),
        ),
        data=Data(path="data/llava-pretrain558k", max_tokens=2048, aspect="square"),
        parallel=Parallel(tp=2, sequence_parallel=True),
        optim=Optim(lr=1e-3, schedule="cosine", warmup=0.03, weight_decay=0.0),
        train=Train(epochs=1, global_batch=256, micro_batch=8, freeze=("vision", "llm"), recompute="full"),
        checkpoint=Checkpoint(dir="runs/llava15-pretrain", every_steps=500),
    )
