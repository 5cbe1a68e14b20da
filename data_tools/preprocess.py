"""LLaVA JSON and its pictures -> PREFIX.bin, PREFIX.idx and PREFIX.json, which training reads.

python data_tools/preprocess.py --input llava.json --image-dir images --family llava --tokenizer DIR --output PREFIX
"""

import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from megamm.data.indexed import Writer
from megamm.data.prepare import Document, Preparer, Recipe, count_faults, prepare
from megamm.data.sources import Fault, LlavaSource
from megamm.errors import DataError, MegammError


@dataclass(kw_only=True, slots=True)
class Options:
    """Tokenise conversations and gather their pictures into one indexed dataset. Samples that cannot be used are
    skipped, counted by reason and listed in PREFIX.skipped.jsonl. Nothing is dropped for its length."""

    input: Path
    """LLaVA conversations: a JSON list, or JSON lines."""
    image_dir: Path
    """Directory that the pictures' paths begin at; nothing outside it is ever read."""
    family: str
    """Family of models that will train on it, such as `llava`."""
    tokenizer: Path
    """Directory of the llm's tokenizer."""
    output: str
    """Prefix of the files to write."""
    template: str | None = None
    """Conversation format; default: the family's for sft. `plain` is the one for pretraining the projector."""
    marker: str | None = None
    """Text that stands for a picture in the conversations; default: the family's. LLaVA's files have `<image>`."""
    workers: int = 1
    """Processes. The output does not depend on it."""
    max_bad: float = 0.01
    """Largest share of samples that may be skipped, 0 to 1; above it nothing is written but the list of them."""


def main(options: Options) -> None:
    """Write the dataset. Raises MegammError where it cannot be, or where too many samples are bad."""
    if not 0 <= options.max_bad <= 1:
        raise DataError(f"--max-bad: {options.max_bad} is no share; give a number from 0 to 1")
    from megamm.registry import family  # imports megatron, which the processes of --workers never need

    model = family(options.family)
    recipe = Recipe(
        image_dir=options.image_dir,
        tokenizer_dir=options.tokenizer,
        template=options.template or model.template,
        marker=options.marker or model.marker,
    )
    tokenizer = Preparer(recipe).tokenizer  # also says now, and not in some process later, what does not fit
    source = LlavaSource(options.input)
    if not len(source):
        raise DataError(f"{options.input}: holds no samples")
    console = Console(stderr=True)
    faults: list[Fault] = []
    with Writer(options.output) as writer:
        for result in _with_progress(prepare(source, recipe, options.workers), len(source), console):
            if isinstance(result, Fault):
                faults.append(result)
            else:
                writer.add(result.ids, result.images, result.spans)
        skipped = count_faults(faults)
        _list_faults(Path(f"{options.output}.skipped.jsonl"), faults)
        _check_share(len(faults), len(source), options, skipped)
        info = writer.finish(
            {
                "family": options.family,
                "template": recipe.template,
                "tokenizer": {"file": tokenizer.name, "hash": tokenizer.hash},
                "skipped": skipped,
            }
        )
    console.print(
        f"{options.output}: {info['documents']} documents, {info['images']} images, {info['tokens']} tokens "
        f"({info['targets']} targets), {info['bin_bytes'] / 1e6:.1f} MB; skipped {_summary(skipped)}",
        soft_wrap=True,
    )


def _check_share(bad: int, total: int, options: Options, skipped: dict[str, int]) -> None:
    if bad > options.max_bad * total or bad == total:
        raise DataError(
            f"{options.input}: {bad} of {total} samples cannot be used ({_summary(skipped)}), --max-bad allows "
            f"{options.max_bad:.2%}; see {options.output}.skipped.jsonl, mend the data or raise --max-bad"
        )


def _summary(skipped: dict[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in skipped.items()) or "none"


def _list_faults(path: Path, faults: list[Fault]) -> None:
    aside = path.with_name(path.name + ".tmp")
    lines = [{"where": fault.where, "reason": fault.fault.reason, "message": str(fault.fault)} for fault in faults]
    try:
        aside.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        os.replace(aside, path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error}); make room, or choose another --output") from error


def _with_progress(results: Iterable[Document | Fault], total: int, console: Console) -> Iterator[Document | Fault]:
    columns = (
        TextColumn("preprocess"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield from progress.track(results, total=total)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.finished_speed or task.speed or 0:.0f} samples/s")


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except MegammError as error:
        sys.exit(f"error: {error}")
