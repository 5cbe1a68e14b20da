"""The whole way in a few minutes on two CPU cores: data, model, training, export, captions, report.

Runs the commands that a user would type, prints each before it runs, and stops at the first that fails. What an earlier
quickstart wrote to the same folder is removed first.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from megamm.testing.families import TINY

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ("llava", "tinyllava", "imp", "vw_lmm")
"""Families whose tiny model transformers' own llava class can hold."""
_WORDS = " --loss.vm-weight 0.05 --loss.detach-teacher"
OPTIONS = {
    # From random weights, visual words that may move become what is easiest to predict: the same for every picture.
    "vw_lmm": _WORDS,
    "vw_lmm_pif": f"{_WORDS} --train.steps 800",
    # Its queries must first learn where to look.
    "mplug_owl2": " --train.steps 800",
}
"""What a family's training needs beside the recipe."""
FAMILIES = (*NATIVE, "vw_lmm_pif", "mplug_owl2", "mplug_owl3")


def commands(run: str, family: str) -> list[str]:
    """The command lines, in order; `run` is the folder to work in, relative to the repository."""
    of_family = of_template = of_run = of_export = of_caption = ""
    if family != "llava":
        of_family = f" --family {family}"
        of_template = f" --template {TINY[family].template}"
        of_run = (
            f" --model.family {family} --model.pretrained {run}/start --data.path {run}/dataset "
            f"--checkpoint.dir {run}/train"
        )
        of_run += OPTIONS.get(family, "")
        of_export = f" --dialect hf{of_template}" if family in NATIVE else ""
        of_caption = "" if family in NATIVE else of_family
    return [
        f"python examples/quickstart/draw.py --output {run}/data",
        f"python examples/quickstart/make_model.py{of_family} --data {run}/data/train.json --output {run}/hf",
        f"python data_tools/preprocess.py --input {run}/data/train.json --image-dir {run}/data/images "
        f"--family {family}{of_template} --tokenizer {run}/hf --output {run}/dataset",
        f"python tools/checkpoint/hf_to_megatron.py --hf {run}/hf{of_family} --output {run}/start",
        f"torchrun --standalone --nproc-per-node 4 -m megamm.train examples/quickstart/recipe.py{of_run}",
        f"python tools/checkpoint/megatron_to_hf.py --checkpoint {run}/train/STEP{of_export} --output {run}/export",
        f"python examples/quickstart/caption.py --model {run}/export{of_caption} --data {run}/data "
        f"--output {run}/captions.json",
        f"python examples/quickstart/report.py --log {run}/train/log.jsonl --captions {run}/captions.json "
        f"--output {run}/report.png",
    ]


def newest(command: str, run: Path) -> str:
    """The command line with STEP replaced by the newest checkpoint of the run."""
    steps = sorted(path.name for path in (run / "train").glob("step_????????"))
    return command.replace("STEP", steps[-1]) if steps else command


def words(command: str) -> list[str]:
    """What is started for a command line: its programs are those of this interpreter's environment."""
    program, *rest = shlex.split(command)
    module = {"python": [], "torchrun": ["-m", "torch.distributed.run"]}[program]
    return [sys.executable, *module, *rest]


def main(family: str) -> int:
    """Run all steps; the exit status of the first that fails, else 0."""
    name = "quickstart" if family == "llava" else f"quickstart-{family}"
    run = ROOT / "runs" / name
    if run.exists():
        shutil.rmtree(run)
    # One thread per process: torchrun starts four for two cores.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    started = time.perf_counter()
    for command in commands(f"runs/{name}", family):
        command = newest(command, run)
        print(f"\n$ {command}", flush=True)
        begun = time.perf_counter()
        code = subprocess.run(words(command), cwd=ROOT, env=environment, check=False).returncode
        if code:
            print(f"\nerror: the command above ended with exit status {code}", file=sys.stderr)
            return code
        print(f"({time.perf_counter() - begun:.0f} s)", flush=True)
    print(f"\ndone in {time.perf_counter() - started:.0f} s; look at runs/{name}/report.png")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, default="llava", help="family of models to run through")
    sys.exit(main(parser.parse_args().family))
