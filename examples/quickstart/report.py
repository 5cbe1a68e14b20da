"""Draw the report: the loss curve of a run, and some held-out pictures with what the trained model says of them."""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("agg")  # a file, on a machine that may have no screen
import matplotlib.pyplot as plt
from PIL import Image

RIGHT, WRONG = "#1a7f37", "#c62828"
COLUMNS, ROWS = 6, 2


def chosen(results: list[dict], number: int) -> list[dict]:
    """Up to `number` results: wrong ones first, but no more than a third, then right ones of unseen and seen things."""
    wrong = [result for result in results if not result["right"]][: number // 3]
    unseen = [result for result in results if result["right"] and result["unseen"]][: number // 3]
    rest = [result for result in results if result["right"] and not result["unseen"]]
    return (wrong + unseen + rest)[:number]


def report(log: Path, captions: Path, output: Path) -> None:
    """Write a PNG. `log` has one JSON object per step with `step` and `loss`; `captions` is caption.py's output."""
    steps = [json.loads(line) for line in log.read_text().splitlines()]
    results = json.loads(captions.read_text())
    figure = plt.figure(figsize=(12, 9.6), layout="constrained")
    grid = figure.add_gridspec(ROWS + 1, COLUMNS, height_ratios=[1.25] + [1] * ROWS)

    curve = figure.add_subplot(grid[0, :])
    curve.plot([step["step"] for step in steps], [step["loss"] for step in steps], color="#1f5fa8", linewidth=1)
    curve.set(title=f"training loss, {len(steps)} steps", xlabel="step", ylabel="cross-entropy per answer token, nats")
    curve.set_yscale("log")
    curve.grid(alpha=0.3, which="both")
    curve.margins(x=0.01)

    for i, result in enumerate(chosen(results, COLUMNS * ROWS)):
        panel = figure.add_subplot(grid[1 + i // COLUMNS, i % COLUMNS])
        panel.imshow(Image.open(result["image"]))
        panel.set(xticks=[], yticks=[])
        colour = RIGHT if result["right"] else WRONG
        for spine in panel.spines.values():
            spine.set(color=colour, linewidth=3)
        mark = "right" if result["right"] else f"wrong, it is\n{result['expected']}"
        note = "combination never trained on" if result["unseen"] else "combination trained on"
        panel.set_title(result["said"].replace(" at ", "\nat "), fontsize=11, color=colour)
        panel.set_xlabel(f"{mark}\n({note})\n", fontsize=8)

    right = sum(result["right"] for result in results)
    figure.suptitle(f"{right} of {len(results)} held-out pictures captioned wholly right", fontsize=14)
    aside = output.with_suffix(".partial.png")
    figure.savefig(aside, dpi=100)
    aside.replace(output)
    print(f"{output}: loss curve and {COLUMNS * ROWS} captioned pictures")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--log", type=Path, default=Path("runs/quickstart/train/log.jsonl"))
    parser.add_argument("--captions", type=Path, default=Path("runs/quickstart/captions.json"))
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart/report.png"))
    options = parser.parse_args()
    for path, writer in ((options.log, "the training"), (options.captions, "caption.py")):
        if not path.is_file():
            parser.error(f"{path}: no such file; {writer} writes it")
    report(options.log, options.captions, options.output)
