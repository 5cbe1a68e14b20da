"""LLaVA-1.5-7B, stage 2: instruction tuning on the 665k mix; the tower is frozen.

Numbers: arXiv 2310.03744 (hyper-parameter table of the appendix) and the authors' scripts/v1_5/finetune.sh.
To train the tower too: `--train.freeze --optim.vision-lr 2e-6`.
"""

from pathlib import Path

from megamm.config import Checkpoint, Config, Data, Model, Optim, Parallel, Train


def config() -> Config:
    return Config(
        model=Model(
            family="llava",
            pretrained="weights/llava15-pretrained",
            config=str(Path(__file__).with_name("config-7b.json")),
        ),
        data=Data(path="data/llava-sft665k", max_tokens=2048, aspect="pad", group_by_modality_length=True),
        parallel=Parallel(tp=4, pp=2, sequence_parallel=True),
        optim=Optim(lr=2e-5, schedule="cosine", warmup=0.03, weight_decay=0.0),
        train=Train(epochs=1, global_batch=128, micro_batch=4, freeze=("vision",), recompute="full"),
        checkpoint=Checkpoint(dir="runs/llava15-sft", every_steps=500),
    )
