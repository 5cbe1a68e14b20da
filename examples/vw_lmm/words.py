"""VW-LMM on Vicuna-7B, stage 3: the head of visual words learns what the llm predicts; the rest is frozen.

The direction, KL(llm || words), is the one that the authors' code names stage 3. That it is the only term, and that the
head alone is trained, follows from it and is not published (arXiv 2403.07720); the numbers are LLaVA-1.5's.
"""

from pathlib import Path

from megamm.config import Checkpoint, Config, Data, Loss, Model, Optim, Parallel, Train


def config() -> Config:
    return Config(
        model=Model(
            family="vw_lmm",
            pretrained="weights/vw-lmm-tuned",
            config=str(Path(__file__).with_name("config-7b.json")),
        ),
        data=Data(path="data/vw-lmm-sft", max_tokens=2048, aspect="pad", group_by_modality_length=True),
        parallel=Parallel(tp=4, pp=2, sequence_parallel=True),
        optim=Optim(lr=2e-5, schedule="cosine", warmup=0.03, weight_decay=0.0),
        train=Train(epochs=1, global_batch=128, micro_batch=4, freeze=("vision", "projector", "llm"), recompute="full"),
        loss=Loss(lm_weight=0.0, teacher="llm"),
        checkpoint=Checkpoint(dir="runs/vw-lmm-words", every_steps=500),
    )
