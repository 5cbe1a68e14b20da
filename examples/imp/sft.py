"""Imp on Phi-2, stage 2: instruction tuning of projector and llm on the 665k mix; the tower is frozen.

Numbers: the authors' script for full fine-tuning. The released weights come from their script with adapters; the README
has both side by side.
"""

from pathlib import Path

from megamm.config import Checkpoint, Config, Data, Model, Optim, Parallel, Train


def config() -> Config:
    return Config(
        model=Model(
            family="imp",
            pretrained="weights/imp-phi2-pretrained",
            config=str(Path(__file__).with_name("config-phi2.json")),
        ),
        data=Data(path="data/imp-phi2-sft665k", max_tokens=3072, aspect="square", group_by_modality_length=True),
        parallel=Parallel(tp=4, sequence_parallel=True),
        optim=Optim(lr=2e-5, schedule="cosine", warmup=0.03, weight_decay=0.0),
        train=Train(epochs=2, global_batch=128, micro_batch=4, freeze=("vision",), recompute="full"),
        checkpoint=Checkpoint(dir="runs/imp-phi2-sft", every_steps=500),
    )
