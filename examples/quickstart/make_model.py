"""Make what a run starts from: a tokenizer and a random tiny model of a family, as a Hugging Face directory."""

import argparse
import json
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from megamm.testing.families import TINY, tiny
from megamm.testing.tiny import tiny_llava


def texts(data: Path) -> list[str]:
    """All that is said in LLaVA conversations, less the image markers: what the tokenizer is trained on."""
    samples = json.loads(data.read_text())
    return [turn["value"].replace("<image>", "").strip() for sample in samples for turn in sample["conversations"]]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=["llava", *TINY], default="llava")
    parser.add_argument("--data", type=Path, default=Path("runs/quickstart/data/train.json"))
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart/hf"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if not options.data.is_file():
        parser.error(f"--data {options.data}: no such file; draw.py writes it")
    disable_progress_bar()
    if options.family == "llava":
        tiny_llava(options.output, texts=texts(options.data), seed=options.seed)
    else:
        tiny(options.output, options.family, texts=texts(options.data), seed=options.seed)
    print(f"{options.output}: a tiny {options.family} with random weights")
