"""VW-LMM on Vicuna-7B, stage 4 with pseudo image features: the llm reads mean embeddings under the visual words.

Equal weights and the direction, KL(words || llm), are the authors' code's (arXiv 2403.07720); what is trained, and the
numbers, are not published: they are those of LLaVA-1.5's instruction tuning.
"""

from pathlib import Path

from megamm.config import Checkpoint, Config, Data, Loss, Model, Optim, Parallel, Train


def config() -> Config:
    return Config(
        model=Model(
            family="vw_lmm_pif",
            pretrained="weights/vw-lmm-pif-words",
            config=str(Path(__file__).with_name("config-7b.json")),
        ),
        data=Data(path="data/vw-lmm-pif-sft", max_tokens=2048, aspect="pad", group_by_modality_length=True),
        parallel=Parallel(tp=4, pp=2, sequence_parallel=True),
        optim=Optim(lr=2e-5, schedule="cosine", warmup=0.03, weight_decay=0.0),
        train=Train(epochs=1, global_batch=128, micro_batch=4, freeze=("vision",), recompute="full"),
        loss=Loss(lm_weight=1.0, vm_weight=1.0, teacher="words"),
        checkpoint=Checkpoint(dir="runs/vw-lmm-pif-joint", every_steps=500),
    )
