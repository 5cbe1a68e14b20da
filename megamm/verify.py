"""The proof that a conversion is right: a Hugging Face checkpoint, run by megamm at a layout, against recorded results.

`verify` starts local ranks once, loads the checkpoint straight into the model at that layout, runs every case with
everything trainable through the training step's own schedule, and compares array by array. A case is an .npz with the
inputs and outputs of the authors' code: `input_ids`, `labels`, `attention_mask`, `pixel_values`, `image_row`,
`image_is_dummy`, `media_offset` where pictures stand beside the sequence, and outputs under the names of `LIMITS`.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from megamm import backend
from megamm.batch import IGNORE, IMAGE, Batch, Sample
from megamm.config.schema import Parallel
from megamm.data.loader import collate
from megamm.data.text import expand
from megamm.errors import CheckpointError, DataError
from megamm.inference.greedy import greedy
from megamm.models.build import build_stages, units
from megamm.models.layers.visual_words import VisualWords
from megamm.models.options import VlmOptions
from megamm.models.parameters import canonical_parameters, fill, join
from megamm.models.spec import Build
from megamm.models.vlm import VLM
from megamm.parallel import groups
from megamm.parallel.check import check_sizes
from megamm.parallel.groups import gather_over_tp
from megamm.parallel.launch import RankPool
from megamm.parallel.placement import Layout, choose_layout, parse_layout
from megamm.registry import FAMILIES, family
from megamm.training.optim import wrap
from megamm.training.setup import part_sizes
from megamm.training.step import fewest_batches, mean_loss, mean_terms, run_pipeline
from megamm.weights.convert import open_hf

EQUAL = 0.0
LIMITS = {
    "vision_features": 1e-5,
    "visual_tokens": 1e-5,
    "visual_words": 1e-5,
    "pseudo_image_features": 1e-5,
    "layer_outputs": 2e-5,
    "logits": 2e-5,
    "loss": 1e-5,
    "loss_lm": 1e-5,
    "vw_kl_stage4": 1e-5,
    "vw_kl_stage3": 1e-5,
    "expanded_labels": EQUAL,
    "expanded_attention_mask": EQUAL,
    "modality_indicators": EQUAL,
    "greedy_tokens": EQUAL,
}
"""Largest absolute difference per output array. Other operator orders move float32 logits by up to 4e-6; the smallest
mistake tried (a norm's epsilon) moves something in this list by 9e-4."""
GRAD_LIMIT = 1e-4
"""Largest abs(a - b) / (b + 1e-3) of two gradient norms, and the same of full gradients, elementwise over the norm."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What to verify, and how the model is laid out for it."""

    hf: str
    """Hugging Face directory."""
    family: str | None = None
    """Family of the checkpoint; found from its configuration and keys when only one fits."""
    tower: str | None = None
    """Directory with the vision tower, where it is published apart."""
    tp: int = 1
    """Tensor parallel size."""
    pp: int = 1
    """Pipeline parallel size."""
    dp: int = 1
    """Replicas; each runs the whole case."""
    layout: str = "auto"
    """The cut, as parallel.layout of a recipe."""
    sequence_parallel: bool = False
    """Split the sequence of the llm over the tensor parallel ranks."""
    recompute: Literal["none", "full"] = "none"
    """As train.recompute of a recipe."""

    @property
    def parallel(self) -> Parallel:
        """The layout as a run would be configured with."""
        return Parallel(tp=self.tp, pp=self.pp, layout=self.layout, sequence_parallel=self.sequence_parallel)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """Recorded inputs as samples, recorded outputs as they are."""

    name: str
    samples: list[Sample]
    expected: dict[str, np.ndarray]
    prompt: Sample | None
    """What greedy decoding starts from, where the case has it."""


@dataclass(kw_only=True, slots=True)
class Report:
    """What one case gave; printed as one JSON line."""

    case: str
    differences: dict[str, float] = field(default_factory=dict)
    loss: float = float("nan")
    expected_loss: float = float("nan")
    gradient: float | None = None
    """Largest gradient difference, in units of abs(a - b) / (b + 1e-3)."""
    worst_gradient: str | None = None
    ok: bool = True

    def line(self) -> str:
        """One JSON object; NaN, which JSON lacks, as null."""
        found = {
            "case": self.case,
            **self.differences,
            "loss": self.loss,
            "expected_loss": self.expected_loss,
            "gradient": self.gradient,
            "worst_gradient": self.worst_gradient,
            "ok": self.ok,
        }
        return json.dumps({k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in found.items()})


def load_case(path: str | Path, options: VlmOptions) -> Case:
    """Read a case for a model of these options. Raises DataError for a file that is none."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        ids_BT, mask_BT, pixels = arrays["input_ids"], arrays["attention_mask"], arrays["pixel_values"]
        labels_BT, rows = arrays["labels"], arrays["image_row"]
        is_dummy = arrays["image_is_dummy"].astype(bool)
        frames = arrays.get("frames_per_slot")
        needed = {"loss"}
        needed |= {"greedy_tokens"} if "greedy_prompt" in arrays else set()
        needed |= {"expanded_attention_mask"} if {"logits", "layer_outputs"} & arrays.keys() else set()
        if missing := sorted(needed - arrays.keys()):
            raise KeyError(", ".join(missing))
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise DataError(
            f"--case {path}: not a verification case ({error}); megamm/verify.py says what one holds"
        ) from error

    starts = _starts(arrays) if options.llm.hyper is not None else None

    def sample(b: int, ids: np.ndarray, labels: np.ndarray) -> Sample:
        if frames is not None:  # every frame becomes an image of its own, one behind the other
            first, is_slot = int((ids_BT[:b] == IMAGE).sum()), ids == IMAGE
            repeats = np.ones_like(ids)
            repeats[is_slot] = frames[first : first + is_slot.sum()]
            ids, labels = np.repeat(ids, repeats), np.repeat(labels, repeats)
        own = pixels[(rows == b) & ~is_dummy]
        if starts is None:
            ids, labels, num_images = _expanded(ids, labels, options)
        else:
            num_images = int(np.count_nonzero(starts[b] < len(ids)))
        return Sample(
            ids_S=torch.from_numpy(ids),
            labels_S=torch.from_numpy(labels),
            pixels_I3HW=torch.from_numpy(own[:num_images].copy()),
            num_images=num_images,
            starts_I=None if starts is None else torch.from_numpy(starts[b][:num_images]),
        )

    samples = [sample(b, ids_BT[b][mask_BT[b] == 1], labels_BT[b][mask_BT[b] == 1]) for b in range(len(ids_BT))]
    # Nobody takes the tokens of a blank image, and ours are other blanks than the authors'.
    for name in ("vision_features", "visual_tokens", "visual_words", "pseudo_image_features"):
        if name in arrays and len(arrays[name]) == len(is_dummy):
            arrays[name] = arrays[name][~is_dummy]
            if is_dummy.all():
                del arrays[name]
    prompt = None
    if "greedy_prompt" in arrays:
        ids = arrays["greedy_prompt"][0]
        prompt = sample(0, ids, np.full_like(ids, IGNORE))
    return Case(name=Path(path).stem, samples=samples, expected=arrays, prompt=prompt)


def _starts(arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Where the placeholder of each picture begins, int64, row by row. A case says it by `media_offset`: [B, T, 2] with
    the range of pictures that each token sees, the first behind a placeholder's first; or the starts of all rows one
    after the other, `media_offset_count` of each row."""
    num_rows = len(arrays["input_ids"])
    if "media_offset" not in arrays:
        return [np.empty(0, dtype=np.int64)] * num_rows
    offset = arrays["media_offset"]
    if offset.ndim == 1:
        return np.split(offset, np.cumsum(arrays["media_offset_count"])[:-1])
    num_seen_BT = offset[:, :, 1] - offset[:, :, 0]
    return [np.flatnonzero(np.diff(num_seen)) for num_seen in num_seen_BT]


def _expanded(ids: np.ndarray, labels: np.ndarray, options: VlmOptions) -> tuple[np.ndarray, np.ndarray, int]:
    """One IMAGE per visual token, whether the case has one id per image or, as transformers does, one per token."""
    per_image = options.tokens_per_image
    if (ids == IMAGE).any() or options.image_token_id is None:
        spans = np.array([(i, i + 1) for i in np.flatnonzero(labels != IGNORE)]).reshape(-1, 2)
        max_tokens = options.max_tokens or options.llm.max_positions
        ids, labels, starts = expand(ids, spans, per_image, max_tokens)
        return ids, labels, len(starts)
    is_image = ids == options.image_token_id
    return np.where(is_image, IMAGE, ids), np.where(is_image, IGNORE, labels), int(is_image.sum()) // per_image


def verify(request: Request, cases: Sequence[str | Path], pool: RankPool | None = None) -> Iterator[tuple[Case, dict]]:
    """Run every case at the layout -> (case, {output name: array}), gradients as `grad:<hf key>`.

    pool: ranks to use, already started; by default a pool of the right size for this call. Raises ConfigError for a
    layout that does not fit the model, CheckpointError and DataError for files that cannot be used.
    """
    options, layout = read_model(request)
    loaded = [load_case(path, options) for path in cases]
    world = request.tp * request.pp * request.dp
    own = pool or RankPool(world, timeout_s=None)
    try:
        results = own.run(run_cases, request, layout.notation(), loaded, ranks=world)
    finally:
        if pool is None:
            own.close()
    for i, case in enumerate(loaded):
        yield case, {name: value for found in results for name, value in found[i].items()}


def read_model(request: Request) -> tuple[VlmOptions, Layout]:
    """The model's options and its layout, checked, before any rank is started."""
    checkpoint = open_hf(request.hf, request.tower, _families(request))
    options = checkpoint.options
    flat = units(options, num_tokens=1024, num_images=1, seq_length=1024)
    check_sizes(request.parallel, part_sizes(options), flat)
    if request.sequence_parallel and request.tp == 1:
        raise CheckpointError("--sequence-parallel needs --tp 2 or more")
    return options, choose_layout(request.parallel, flat)


def _families(request: Request) -> list:
    return [family(request.family)] if request.family else list(FAMILIES.values())


def run_cases(request: Request, layout: str, cases: Sequence[Case]) -> list[dict[str, np.ndarray]]:
    """What this rank knows of each case's outputs; only the first tensor and data parallel rank of a stage reports."""
    backend.start("auto", groups.local_rank())
    checkpoint = open_hf(request.hf, request.tower, _families(request))
    options = checkpoint.options
    flat = units(options, num_tokens=1024, num_images=1, seq_length=1024)
    build = Build(
        tp=request.tp,
        sequence_parallel=request.sequence_parallel,
        layout=parse_layout(layout, flat, request.pp),
        recompute=request.recompute,
    )
    groups.start_distributed()
    ranks = groups.start(request.parallel, build.layout)
    modules = build_stages(options, build, checkpoint.table)
    fill(modules, checkpoint.table, lambda entry: checkpoint.load(entry.name))
    stages = wrap(modules, distributed_optimizer=False)
    reports = ranks.tp_rank == 0 and ranks.dp_rank == 0
    results = []
    for case in cases:
        for stage in stages:
            stage.zero_grad_buffer()
        batch = _batch(case.samples, options, build)
        batches = [batch] * fewest_batches(stages)
        with captured(modules, batch, options) as outputs:
            reduced = run_pipeline(stages, batches)
        loss, _ = mean_loss(reduced)
        found = {name: value.float().cpu().numpy() for name, value in outputs.items()}
        for name, parameter in canonical_parameters(modules):
            entry = checkpoint.table[name]
            whole = join(entry, getattr(parameter, "main_grad"))  # noqa: B009 - DDP's, unknown to torch's types
            for key, grad in zip(entry.hf, entry.unpack(whole), strict=True):
                found[f"grad:{key}"] = grad.float().cpu().numpy().copy()
        if case.prompt is not None:
            wanted = len(case.expected["greedy_tokens"])
            tokens = greedy(
                stages,
                [case.prompt],
                wanted,
                tokens_per_image=options.tokens_per_image,
                image_size=options.vision.image_size,
                eos_id=None,
            )
            found["greedy_tokens"] = np.array(tokens[0])
        found["loss"] = np.array(loss)
        if options.has_visual_words:
            terms = mean_terms(stages, reduced)
            found |= {"loss_lm": np.array(terms["loss_lm"]), "vw_kl_stage4": np.array(terms["loss_vm"])}
            with taught_by_the_llm(modules):
                terms = mean_terms(stages, run_pipeline(stages, batches, forward_only=True))
            found["vw_kl_stage3"] = np.array(terms["loss_vm"])
        results.append(found if reports else {})
    return results


def _batch(samples: Sequence[Sample], options: VlmOptions, build: Build) -> Batch:
    return collate(
        samples,
        pad_id=0,
        pad_multiple=build.tp,
        tokens_per_image=options.tokens_per_image,
        with_pixels=True,
        image_size=options.vision.image_size,
    )


@contextmanager
def captured(modules: Sequence[VLM], batch: Batch, options: VlmOptions) -> Iterator[dict[str, Tensor]]:
    """Collect, while the body runs one micro-batch, what passes through this rank's modules, whole and batch first:
    vision_features [I, P, hv], visual_tokens [I, P, H], layer_output.K [B, S, H], logits [B, S, V], and where the model
    has them visual_words [I, P, V] and pseudo_image_features [I, P, H]."""
    found: dict[str, Tensor] = {}
    hooks = []

    def keep(name: str, x: Tensor, is_sequence_slice: bool = False) -> None:
        slices = gather_over_tp(x.detach()) if is_sequence_slice else [x.detach()]
        found[name] = torch.cat(slices).transpose(0, 1).cpu()

    def on_projector(_: torch.nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        if batch.num_images:
            keep("vision_features", args[0])
            keep("visual_tokens", output)

    def on_layer(layer: Any, _: Any, output: tuple[Tensor, Tensor | None]) -> None:
        keep(f"layer_output.{layer.layer_number - 1}", output[0], layer.config.sequence_parallel)

    def on_head(_: torch.nn.Module, __: Any, output: tuple[Tensor, Tensor | None]) -> None:
        logits_SBV = torch.cat(gather_over_tp(output[0].detach()), dim=-1)
        found["logits"] = logits_SBV[..., : options.llm.vocab_size].transpose(0, 1).cpu()

    def on_words(words: VisualWords, args: tuple[Tensor, ...], _: Tensor) -> None:
        num_rows = batch.num_images * options.tokens_per_image  # behind them only what fills up the slices
        with torch.no_grad():
            words_RV = torch.cat(gather_over_tp(words.log_words(args[0][:num_rows]).exp()), dim=-1)
        words_RV = words_RV[:, : options.llm.vocab_size]
        if num_rows:
            found["visual_words"] = words_RV.unflatten(0, (batch.num_images, -1)).cpu()

    def on_pseudo_features(_: torch.nn.Module, __: Any, output: Tensor) -> None:
        if batch.num_images:
            keep("pseudo_image_features", output)

    for module in modules:
        if module.words is not None:
            hooks.append(module.words.register_forward_hook(on_words))
            hooks.append(module.words.pseudo_features.register_forward_hook(on_pseudo_features))
        if module.projector is not None:
            hooks.append(module.projector.register_forward_hook(on_projector))
        if module.llm is not None:
            hooks += [layer.register_forward_hook(on_layer) for layer in module.llm.decoder.layers]
            if module.llm.post_process:
                hooks.append(module.llm.output_layer.register_forward_hook(on_head))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def taught_by_the_llm(modules: Sequence[VLM]) -> Iterator[None]:
    """While the body runs, the divergence of visual words is the other way round."""
    losses = [module.loss for module in modules]
    for module in modules:
        module.loss = replace(module.loss, teacher="llm")
    try:
        yield
    finally:
        for module, loss in zip(modules, losses, strict=True):
            module.loss = loss


def outputs_of(case: Case, found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The run's results under the names and in the shapes that a case has them, padding cut or zero."""
    out = {name: value for name, value in found.items() if not name.startswith(("layer_output.", "grad:"))}
    layers = sorted(
        (int(name.split(".")[1]), value) for name, value in found.items() if name.startswith("layer_output.")
    )
    out["layer_outputs"] = np.stack([value for _, value in layers])
    length = max(len(sample.ids_S) for sample in case.samples)
    labels = np.full((len(case.samples), length), IGNORE, dtype=np.int64)
    mask, is_visual = np.zeros_like(labels), np.zeros_like(labels)
    for b, sample in enumerate(case.samples):
        labels[b, : len(sample.labels_S)] = sample.labels_S.numpy()
        mask[b, : len(sample.labels_S)] = 1
        is_visual[b, : len(sample.ids_S)] = sample.ids_S.numpy() == IMAGE
    out |= {"expanded_labels": labels, "expanded_attention_mask": mask, "modality_indicators": is_visual}
    out["logits"] = out["logits"][:, :length]
    out["layer_outputs"] = out["layer_outputs"][:, :, :length]
    return out


def compare(
    case: Case, found: dict[str, np.ndarray], grad_norms: dict[str, float] | None, atol: float | None = None
) -> Report:
    """Every output array that the case holds, and the gradient norms where given, against the run's results."""
    ours = outputs_of(case, found)
    report = Report(case=case.name, loss=float(ours["loss"]), expected_loss=float(case.expected["loss"]))
    limits = LIMITS if atol is None else {**LIMITS, "logits": atol}
    for name, limit in limits.items():
        if name not in case.expected:
            continue
        difference = _difference(name, ours, case.expected)
        report.differences[name] = difference
        report.ok = report.ok and difference <= limit
    for key, full in case.expected.items():
        if key.startswith("grad:"):
            scale = float(np.linalg.norm(full)) + 1e-3
            difference = _difference(key, found, case.expected) / scale
            report.differences[key] = difference
            report.ok = report.ok and difference <= GRAD_LIMIT
    if grad_norms:
        report.gradient, report.worst_gradient = max(
            (_norm_difference(found.get(f"grad:{key}"), expected), key) for key, expected in grad_norms.items()
        )
        report.ok = report.ok and report.gradient <= GRAD_LIMIT
    return report


def _norm_difference(grad: np.ndarray | None, expected: float) -> float:
    if grad is None:
        return float("inf")
    norm = float(np.linalg.norm(grad.astype(np.float64)))
    return abs(norm - expected) / (expected + 1e-3) if np.isfinite(norm) else float("inf")


def _difference(name: str, ours: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """Largest absolute difference, where the mask is 1 for arrays over positions; inf for another shape or NaN."""
    a, b = ours.get(name), expected[name]
    if a is None or a.shape != b.shape:
        return float("inf")
    if name in ("logits", "layer_outputs"):
        is_real = expected["expanded_attention_mask"].astype(bool)
        a, b = a[..., is_real, :], b[..., is_real, :]
    if a.size == 0:
        return 0.0
    worst = float(np.abs(a.astype(np.float64) - b).max())
    return worst if np.isfinite(worst) else float("inf")
