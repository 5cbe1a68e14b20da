"""TinyLLaVA_Factory, stage 1, for any of its decoders: align the projector on 558k captions; tower and llm are frozen.

Numbers: the authors' scripts/train/pretrain.sh and scripts/train/qwen2/pretrain_qwen2.sh. Another decoder:
`--model.config examples/tinyllava/factory-qwen2/config.json` and a start made of it.
"""

from pathlib import Path

from megamm.config import Checkpoint, Config, Data, Model, Optim, Parallel, Train


def config() -> Config:
    return Config(
        model=Model(
            family="tinyllava",
            pretrained="weights/tinyllava-factory-start",
            config=str(Path(__file__).parent / "factory-phi2" / "config.json"),
        ),
        data=Data(path="data/tinyllava-factory-pretrain558k", max_tokens=2048, aspect="square"),
        parallel=Parallel(tp=2, sequence_parallel=True),
        optim=Optim(lr=1e-3, schedule="cosine", warmup=0.03, weight_decay=0.0),
        train=Train(epochs=1, global_batch=256, micro_batch=8, freeze=("vision", "llm"), recompute="full"),
        checkpoint=Checkpoint(dir="runs/tinyllava-factory-pretrain", every_steps=500),
    )
