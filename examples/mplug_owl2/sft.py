"""mPLUG-Owl2-7B, stage 2: instruction tuning of the whole model; as the authors' public script does it, less the tower.

Numbers: arXiv 2311.04257 (hyper-parameter table of the appendix) and the authors' scripts/finetune.sh. What is not
published and what differs stands in README.md beside this file. As the script:
`--train.freeze vision --train.global-batch 128`.
"""

from pathlib import Path

from megamm.config import Checkpoint, Config, Data, Model, Optim, Parallel, Train


def config() -> Config:
    return Config(
        model=Model(
            family="mplug_owl2",
            pretrained="weights/mplug-owl2-pretrained",
            config=str(Path(__file__).with_name("config-7b.json")),
        ),
        data=Data(path="data/mplug-owl2-sft", max_tokens=2048, aspect="pad", group_by_modality_length=True),
        parallel=Parallel(tp=4, pp=2, sequence_parallel=True),
        optim=Optim(lr=2e-5, schedule="cosine", warmup=0.03, weight_decay=0.0),
        train=Train(epochs=1, global_batch=256, micro_batch=4, recompute="full"),
        checkpoint=Checkpoint(dir="runs/mplug-owl2-sft", every_steps=500),
    )
