"""What a run reports of itself: one line per step, on the terminal, as JSON lines and to TensorBoard.

Numbers come from the caller; nothing here measures, reduces over ranks or touches a device.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from math import isfinite
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from torch.utils.tensorboard import SummaryWriter

from megamm.errors import MegammError

LOG = "log.jsonl"
"""Name of the JSON lines in the directory of a run; one object per step, `Line`'s fields as keys."""

_TAGS = {
    "loss": "train/loss",
    "loss_lm": "train/loss_lm",
    "loss_vm": "train/loss_vm",
    "grad_norm": "train/grad_norm",
    "lr": "train/lr",
    "eval_loss": "eval/loss",
    "tokens_per_s": "speed/tokens_per_s",
    "images_per_s": "speed/images_per_s",
    "model_tflops": "speed/model_tflops",
    "data_wait_s": "speed/data_wait_s",
    "step_s": "speed/step_s",
    "memory_gib": "memory/gib",
}


_OPTIONAL = ("eval_loss", "loss_lm", "loss_vm")


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """What is written of one step."""

    step: int
    """Optimizer steps done, this one included."""
    loss: float
    """Mean over the supervised tokens of the global batch; of a loss with several terms, their weighted sum."""
    grad_norm: float
    """Global gradient norm before clipping."""
    lr: float
    """Learning rate of this step."""
    tokens_per_s: float
    """Tokens of the global batch per second of this step, padding not counted."""
    images_per_s: float
    """Images of the global batch per second of this step."""
    model_tflops: float
    """10^12 FLOPs per second that the model needs, over all ranks; recomputation does not count."""
    data_wait_s: float
    """Seconds of this step in which the loop waited for its batches."""
    step_s: float
    """Seconds that this step took; evaluation and saving not counted."""
    memory_gib: float
    """Peak memory of the writing rank."""
    samples: int
    """Samples seen since the beginning of the training."""
    eval_loss: float | None = None
    """Loss on the evaluation data after this step; None where there was no evaluation."""
    loss_lm: float | None = None
    """Mean cross-entropy over the supervised tokens, where the loss has a second term."""
    loss_vm: float | None = None
    """Mean divergence between visual words and predictions over the visual tokens, where the loss has it."""


class Meter:
    """Writes one line per step. All ranks call it; only the writer does anything."""

    def __init__(
        self,
        directory: str | Path,
        total_steps: int,
        flops_per_step: float | Callable[[int, int], float],
        *,
        memory_bytes: Callable[[], int],
        is_writer: bool,
        console: Console | None = None,
    ):
        """directory: of the run, made when absent. flops_per_step: FLOPs of the forward and backward pass of one
        global batch, as a number or as a function of its tokens and images. memory_bytes: peak memory of this rank,
        such as `Backend.memory_bytes`. is_writer: true on exactly one rank."""
        self.directory = Path(directory)
        self.total_steps = total_steps
        self.flops_per_step = flops_per_step
        self.memory_bytes = memory_bytes
        self.is_writer = is_writer
        self.console = console or Console()
        self._log: IO[str] | None = None

    def start(self, step: int = 0) -> None:
        """Open the log after `step` steps: 0 at the beginning, more when a run is resumed.

        Lines of later steps, which are now done again, are dropped from log.jsonl and hidden in TensorBoard. Raises
        MegammError when log.jsonl is not what this class writes.
        """
        self._first_step, self._started = step, time.monotonic()
        if not self.is_writer:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        _drop_after(self.directory / LOG, step)
        self._log = (self.directory / LOG).open("a", encoding="utf-8")
        self._tensorboard = SummaryWriter(str(self.directory / "tensorboard"), purge_step=step + 1)
        self._progress: Progress | None = None
        if self.console.is_terminal:
            text = TextColumn("{task.percentage:.0f}% ETA {task.fields[eta]}")
            self._progress = Progress(BarColumn(None), MofNCompleteColumn(), text, console=self.console)
            self._task: TaskID = self._progress.add_task("", total=self.total_steps, completed=step, eta="?")
            self._progress.start()

    def step(
        self,
        step: int,
        *,
        loss: float,
        grad_norm: float,
        lr: float,
        tokens: int,
        images: int,
        samples: int,
        step_s: float,
        data_wait_s: float,
        eval_loss: float | None = None,
        loss_lm: float | None = None,
        loss_vm: float | None = None,
    ) -> None:
        """Write the line of step number `step`. tokens, images: of the global batch; for the rest see `Line`."""
        if not self.is_writer:
            return
        flops = self.flops_per_step(tokens, images) if callable(self.flops_per_step) else self.flops_per_step
        line = Line(
            step=step,
            loss=loss,
            grad_norm=grad_norm,
            lr=lr,
            tokens_per_s=tokens / step_s,
            images_per_s=images / step_s,
            model_tflops=flops / step_s / 1e12,
            data_wait_s=data_wait_s,
            step_s=step_s,
            memory_gib=self.memory_bytes() / 2**30,
            samples=samples,
            eval_loss=eval_loss,
            loss_lm=loss_lm,
            loss_vm=loss_vm,
        )
        self._write_json(line)
        for name, tag in _TAGS.items():
            if (value := getattr(line, name)) is not None:
                self._tensorboard.add_scalar(tag, value, step)
        self._show(line)

    def close(self) -> None:
        """Finish all files. May be called twice."""
        if self._log is None:
            return
        self._log.close()
        self._log = None
        self._tensorboard.close()
        if self._progress is not None:
            self._progress.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write_json(self, line: Line) -> None:
        """A number that is not finite becomes null: JSON has no word for it."""
        assert self._log is not None, "start() comes first"
        values = {
            key: None if isinstance(value, float) and not isfinite(value) else value
            for key, value in asdict(line).items()
            if key not in _OPTIONAL or value is not None
        }
        self._log.write(json.dumps(values) + "\n")
        self._log.flush()  # a run that is killed has logged every step it has done

    def _show(self, line: Line) -> None:
        done = line.step - self._first_step
        left_s = (time.monotonic() - self._started) / done * (self.total_steps - line.step) if done > 0 else 0.0
        eta = str(timedelta(seconds=round(left_s)))
        text = format_line(line, self.total_steps)
        if self._progress is None:
            self.console.out(f"{text} | ETA {eta}", highlight=False)
        else:
            self._progress.update(self._task, completed=line.step, eta=eta)
            self._progress.console.print(text, soft_wrap=True)


def format_line(line: Line, total_steps: int) -> str:
    """The line as a person reads it."""
    width = len(str(total_steps))
    fields = [
        f"step {line.step:{width}}/{total_steps}",
        f"loss {line.loss:.4f}",
        f"grad norm {line.grad_norm:.3f}",
        f"lr {line.lr:.2e}",
        f"{line.tokens_per_s:,.0f} tokens/s",
        f"{line.images_per_s:,.1f} images/s",
        f"{line.model_tflops:.3g} TFLOP/s",
        f"data wait {line.data_wait_s:.3f} s",
        f"{line.memory_gib:.2f} GiB",
    ]
    if line.loss_lm is not None and line.loss_vm is not None:
        fields[1] += f" (lm {line.loss_lm:.4f}, vm {line.loss_vm:.4f})"
    if line.eval_loss is not None:
        fields.insert(2, f"eval loss {line.eval_loss:.4f}")
    return " | ".join(fields)


def _drop_after(path: Path, step: int) -> None:
    """Keep the lines up to `step`. The last line may be half a line: the run was killed while it wrote."""
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8")
    kept = []
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), start=1):
        try:
            line_step = json.loads(line)["step"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise MegammError(f"{path}, line {number}: not the log of a run; move the file away") from error
        if line_step <= step:
            kept.append(line + "\n")
    aside = path.with_suffix(".partial")
    aside.write_text("".join(kept), encoding="utf-8")
    os.replace(aside, path)
