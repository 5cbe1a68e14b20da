"""The configuration of a run, as a recipe writes it. Every field has a unit; a misspelt field is an error.

Plain typed dataclasses only: no torch, no megatron, no defaults that depend on the machine.
"""

from dataclasses import dataclass, field
from typing import Literal

PARTS = ("vision", "projector", "llm", "words")
"""The parts of a model that can be frozen, or given a learning rate of their own; not every family has `words`, a head
of visual words."""


@dataclass(kw_only=True, slots=True)
class Model:
    """Which model, and where its weights come from."""

    family: str
    """Name of the family in megamm/registry.py, such as `llava`."""
    pretrained: str | None = None
    """Directory of a megamm checkpoint to start from. None: weights are drawn from `train.seed`."""
    config: str | None = None
    """A Hugging Face config.json that gives the sizes, needed where `pretrained` is absent."""


@dataclass(kw_only=True, slots=True)
class Data:
    """What is read, and how a sample becomes tensors."""

    path: str
    """Prefix of the PREFIX.bin, PREFIX.idx and PREFIX.json that data_tools/preprocess.py wrote, or of the PREFIX.json
    of a blend, by data_tools/blend.py."""
    eval_path: str | None = None
    """Prefix of a second dataset for the evaluation loss. None: no evaluation."""
    max_tokens: int = 2048
    """Longest sequence in tokens, visual tokens counted; longer samples are cut at the end."""
    packing: bool = False
    """Lay as many samples into each sequence as fit, none seeing another. `train.global_batch` and `train.micro_batch`
    then count sequences, and `max_tokens` may be more than the model has positions, of which a sample gets no more."""
    aspect: Literal["pad", "stretch", "square"] = "pad"
    """`pad`: paste the picture on a square of the mean colour first. `stretch`: scale its shorter edge to the longer
    one first. `square`: leave it to resize and crop."""
    num_workers: int = 2
    """Processes per rank that read and decode; 0 decodes in the training process."""
    shuffle: bool = True
    """Draw a new order from `train.seed` every epoch. False: the stored order."""
    group_by_modality_length: bool = False
    """Draw it so that every step has only samples with pictures or only text, longest first: less padding. LLaVA's
    option of the same name. Needs `shuffle`; `packing` leaves no padding to save."""


@dataclass(kw_only=True, slots=True)
class Parallel:
    """How the model is cut over ranks. Data parallel size = world size / (tp * pp)."""

    tp: int = 1
    """Tensor parallel size: ranks that share every layer."""
    pp: int = 1
    """Pipeline parallel size: ranks that hold consecutive stages."""
    layout: str = "auto"
    """`auto` balances estimated FLOPs; or an explicit cut such as `Vv*24P|Et*16|t*16L` (V vision.embed, v vision
    layer, P projector, E llm.embed, t llm layer, L llm.head; x*3 repeats x; | next stage)."""
    virtual_stages: int = 1
    """Stages per pipeline rank of layout `auto`; more than 1 interleaves. An explicit cut says it by its length."""
    sequence_parallel: bool = False
    """Split the sequence of norms and residuals over the tp ranks of the llm. Needs tp > 1."""


@dataclass(kw_only=True, slots=True)
class Optim:
    """AdamW, its schedule and clipping."""

    lr: float
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the schedule."""
    vision_lr: float | None = None
    """Peak learning rate of the vision tower; None: `lr`."""
    projector_lr: float | None = None
    """Peak learning rate of the projector; None: `lr`."""
    llm_lr: float | None = None
    """Peak learning rate of the llm; None: `lr`."""
    words_lr: float | None = None
    """Peak learning rate of the head of visual words; None: `lr`."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay after the warm-up."""
    warmup: float = 0.03
    """Share of all steps in which the learning rate rises linearly from 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay; never applied to biases and norms."""
    beta1: float = 0.9
    """Decay of AdamW's first moment."""
    beta2: float = 0.999
    """Decay of AdamW's second moment."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    clip_norm: float = 1.0
    """Global gradient norm to clip at; 0 does not clip."""


@dataclass(kw_only=True, slots=True)
class Loss:
    """What is minimised: the mean cross-entropy of the targets, and in families with visual words the mean divergence
    of the llm's predictions from these. Other families have the first only, and nothing to choose."""

    lm_weight: float = 1.0
    """Factor of the cross-entropy."""
    vm_weight: float = 1.0
    """Factor of the divergence."""
    teacher: Literal["words", "llm"] = "words"
    """`words`: KL(words || llm), the visual words teach the llm. `llm`: KL(llm || words), the other way round."""
    detach_teacher: bool = False
    """Whether the divergence leaves its teacher as it is; False: both distributions move."""


@dataclass(kw_only=True, slots=True)
class Train:
    """How long, how much at once, what is trained."""

    global_batch: int
    """Samples per optimizer step, over all ranks; with `data.packing` sequences."""
    micro_batch: int = 1
    """Samples per forward pass of one data parallel rank; with `data.packing` sequences."""
    epochs: float = 1.0
    """Passes over the data; ignored when `steps` is given."""
    steps: int | None = None
    """Optimizer steps; None: what `epochs` amounts to."""
    freeze: tuple[str, ...] = ()
    """What is not trained: any of vision, projector, llm, words; or the beginning of one, such as `vision[:12]`, the
    tower's embedding and its layers 0 to 11; or `llm.text`, of an llm that treats visual tokens with weights of their
    own (mPLUG-Owl2, mPLUG-Owl3) all the others."""
    precision: Literal["fp32", "bf16", "fp8"] = "bf16"
    """Arithmetic of the layers. fp8 needs a GPU with Transformer Engine and is an error elsewhere."""
    recompute: Literal["none", "full"] = "none"
    """`full`: keep only the input of each layer and run its forward again in the backward pass."""
    seed: int = 42
    """Seed of weight draws and of the data order."""
    eval_every_steps: int = 0
    """Steps between evaluations of `data.eval_path`; 0: only after the last step."""
    eval_samples: int = 256
    """Samples per evaluation; the whole set when it is smaller."""
    backend: Literal["auto", "cpu", "gpu"] = "auto"
    """`auto` takes the GPU when there is one."""


@dataclass(kw_only=True, slots=True)
class Checkpoint:
    """Where a run keeps its state."""

    dir: str
    """Directory of the run: checkpoints under step_XXXXXXXX/ (each with its recipe.json), log.jsonl, TensorBoard
    events."""
    every_steps: int = 0
    """Steps between checkpoints; 0: only after the last step."""
    keep_last: int = 2
    """Newest checkpoints that are kept; 0 keeps all."""
    resume: bool = True
    """Continue from the newest checkpoint in `dir` when there is one, at whatever layout this run has."""


@dataclass(kw_only=True, slots=True)
class Config:
    """One run. A recipe's `config()` returns it; the command line may override any field."""

    model: Model
    data: Data
    optim: Optim
    train: Train
    checkpoint: Checkpoint
    parallel: Parallel = field(default_factory=Parallel)
    loss: Loss = field(default_factory=Loss)
