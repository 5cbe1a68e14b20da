"""VW-LMM on Vicuna-7B, stage 1: align the projector on captions, as LLaVA-1.5 does; the rest is frozen.

The paper (arXiv 2403.07720) and its code publish no hyper-parameters: the numbers are LLaVA-1.5's, arXiv 2310.03744.
The divergence from the visual words, which nothing learns from yet, is only reported.
"""

from pathlib import Path

from megamm.config import Checkpoint, Config, Data, Loss, Model, Optim, Parallel, Train


def config() -> Config:
    return Config(
        model=Model(
            family="vw_lmm",
            pretrained="weights/vw-lmm-start",
            config=str(Path(__file__).with_name("config-7b.json")),
        ),
        data=Data(path="data/vw-lmm-pretrain", max_tokens=2048, aspect="square"),
        parallel=Parallel(tp=2, sequence_parallel=True),
        optim=Optim(lr=1e-3, schedule="cosine", warmup=0.03, weight_decay=0.0),
        train=Train(epochs=1, global_batch=256, micro_batch=8, freeze=("vision", "llm", "words"), recompute="full"),
        loss=Loss(vm_weight=0.0),
        checkpoint=Checkpoint(dir="runs/vw-lmm-pretrain", every_steps=500),
    )
