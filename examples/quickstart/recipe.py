"""The quickstart's training run: everything is trained, from random weights, at TP 2 x PP 2 on two CPU cores."""

from megamm.config import Checkpoint, Config, Data, Model, Optim, Parallel, Train


def config() -> Config:
    return Config(
        model=Model(family="llava", pretrained="runs/quickstart/start"),
        data=Data(path="runs/quickstart/dataset", max_tokens=128, num_workers=0),
        parallel=Parallel(tp=2, pp=2),
        optim=Optim(lr=1.5e-3, warmup=0.2, schedule="cosine", beta2=0.95),
        train=Train(steps=500, global_batch=16, micro_batch=16, precision="fp32"),
        checkpoint=Checkpoint(dir="runs/quickstart/train"),
    )
