"""TinyLLaVA, stage 1 of both recipes: align the projector on 558k captions; tower and llm are frozen.

Numbers: the authors' scripts/tiny_llava/pretrain.sh (Phi-2 and SigLIP).
"""

from pathlib import Path

from megamm.config import Checkpoint, Config, Data, Model, Optim, Parallel, Train


def config() -> Config:
    return Config(
        model=Model(
            family="tinyllava",
            pretrained="weights/tinyllava-start",
            config=str(Path(__file__).parent / "bench-phi2" / "config.json"),
        ),
        data=Data(path="data/tinyllava-pretrain558k", max_tokens=3072, aspect="square"),
        parallel=Parallel(tp=2, sequence_parallel=True),
        optim=Optim(lr=1e-3, schedule="cosine", warmup=0.03, weight_decay=0.0),
        train=Train(epochs=1, global_batch=256, micro_batch=8, freeze=("vision", "llm"), recompute="full"),
        checkpoint=Checkpoint(dir="runs/tinyllava-pretrain", every_steps=500),
    )
