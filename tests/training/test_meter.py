"""The log of a run: what it says, and that a resumed run neither repeats nor loses a line."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megamm.errors import MegammError
from megamm.training.meter import LOG, Meter

STEP: dict[str, Any] = dict(
    loss=2.5, grad_norm=1.25, lr=1e-3, tokens=4000, images=6, samples=8, step_s=2.0, data_wait_s=0.5
)


def make(directory: Path, output: io.StringIO | None = None, terminal: bool = False, **options: Any) -> Meter:
    console = Console(file=output or io.StringIO(), force_terminal=terminal, width=200)
    settings: dict[str, Any] = dict(flops_per_step=6e12, memory_bytes=lambda: 3 * 2**29, is_writer=True)
    return Meter(directory, 10, console=console, **(settings | options))


def read(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / LOG).read_text().splitlines()]


def test_a_line_has_every_number(tmp_path: Path) -> None:
    output = io.StringIO()
    with make(tmp_path, output) as meter:
        meter.start()
        meter.step(1, **STEP)
        meter.step(2, **STEP, eval_loss=3.5)
    first, second = read(tmp_path)
    assert first == {
        "step": 1,
        "loss": 2.5,
        "grad_norm": 1.25,
        "lr": 1e-3,
        "tokens_per_s": 2000.0,
        "images_per_s": 3.0,
        "model_tflops": 3.0,
        "data_wait_s": 0.5,
        "step_s": 2.0,
        "memory_gib": 1.5,
        "samples": 8,
    }
    assert second["eval_loss"] == 3.5
    lines = output.getvalue().splitlines()
    assert lines[0].startswith(
        "step  1/10 | loss 2.5000 | grad norm 1.250 | lr 1.00e-03 | 2,000 tokens/s | 3.0 images/s | 3 TFLOP/s | "
        "data wait 0.500 s | 1.50 GiB | ETA 0:00:0"
    )
    assert "| eval loss 3.5000 |" in lines[1]
    assert "\x1b" not in output.getvalue()  # readable in a log file


def test_the_terminal_shows_progress(tmp_path: Path) -> None:
    output = io.StringIO()
    with make(tmp_path, output, terminal=True) as meter:
        meter.start()
        for step in range(1, 6):
            meter.step(step, **STEP)
    assert "50% ETA 0:00:00" in output.getvalue()
    assert "5/10" in output.getvalue()
    assert len(read(tmp_path)) == 5


def test_flops_may_depend_on_the_batch(tmp_path: Path) -> None:
    with make(tmp_path, flops_per_step=lambda tokens, images: tokens * 1e9 + images * 1e12) as meter:
        meter.start()
        meter.step(1, **STEP)
    assert read(tmp_path)[0]["model_tflops"] == 5.0


def test_a_resumed_run_replaces_the_lines_it_does_again(tmp_path: Path) -> None:
    with make(tmp_path) as meter:
        meter.start()
        for step in range(1, 6):
            meter.step(step, **STEP)
    with (tmp_path / LOG).open("a") as file:
        file.write('{"step": 6, "lo')  # killed while it wrote
    with make(tmp_path) as meter:
        meter.start(3)
        for step in range(4, 8):
            meter.step(step, **(STEP | {"loss": 1.0}))
    assert [(line["step"], line["loss"]) for line in read(tmp_path)] == [
        (1, 2.5),
        (2, 2.5),
        (3, 2.5),
        (4, 1.0),
        (5, 1.0),
        (6, 1.0),
        (7, 1.0),
    ]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert shown == [(step, 2.5 if step < 4 else 1.0) for step in range(1, 8)]
    assert not list(tmp_path.glob("*.partial"))


def test_a_run_from_the_beginning_starts_a_new_log(tmp_path: Path) -> None:
    for _ in range(2):
        with make(tmp_path) as meter:
            meter.start()
            meter.step(1, **STEP)
    assert len(read(tmp_path)) == 1


def test_a_loss_that_is_no_number_is_logged_as_null(tmp_path: Path) -> None:
    with make(tmp_path) as meter:
        meter.start()
        meter.step(1, **(STEP | {"loss": float("nan"), "grad_norm": float("inf")}))
    assert (read(tmp_path)[0]["loss"], read(tmp_path)[0]["grad_norm"]) == (None, None)


def test_a_foreign_log_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / LOG).write_text("step,loss\n1,2\n")
    with pytest.raises(MegammError, match=r"log\.jsonl, line 1: not the log of a run"):
        make(tmp_path).start()
    assert (tmp_path / LOG).read_text() == "step,loss\n1,2\n"


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    output = io.StringIO()
    with make(tmp_path / "run", output, is_writer=False) as meter:
        meter.start()
        meter.step(1, **STEP)
    assert not (tmp_path / "run").exists()
    assert not output.getvalue()
