"""VW-LMM on Vicuna-7B, stage 2: instruction tuning, as LLaVA-1.5 does; tower and visual words are frozen.

The paper (arXiv 2403.07720) and its code publish no hyper-parameters: the numbers are LLaVA-1.5's, arXiv 2310.03744.
"""

from pathlib import Path

from megamm.config import Checkpoint, Config, Data, Loss, Model, Optim, Parallel, Train


def config() -> Config:
    return Config(
        model=Model(
            family="vw_lmm",
            pretrained="weights/vw-lmm-pretrained",
            config=str(Path(__file__).with_name("config-7b.json")),
        ),
        data=Data(path="data/vw-lmm-sft", max_tokens=2048, aspect="pad", group_by_modality_length=True),
        parallel=Parallel(tp=4, pp=2, sequence_parallel=True),
        optim=Optim(lr=2e-5, schedule="cosine", warmup=0.03, weight_decay=0.0),
        train=Train(epochs=1, global_batch=128, micro_batch=4, freeze=("vision", "words"), recompute="full"),
        loss=Loss(vm_weight=0.0),
        checkpoint=Checkpoint(dir="runs/vw-lmm-sft", every_steps=500),
    )
