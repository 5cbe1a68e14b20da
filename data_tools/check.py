"""Say what is wrong with every sample that cannot be used, before anything is preprocessed.

python data_tools/check.py --input llava.json --image-dir images --family llava --tokenizer DIR [--json report.json]
"""

import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from megamm.data.audit import Audit, Bad, audit
from megamm.data.indexed import writing
from megamm.data.pool import processes
from megamm.data.prepare import Recipe, preparer
from megamm.data.progress import progress
from megamm.data.sources import Source
from megamm.errors import MegammError


@dataclass(kw_only=True, slots=True)
class Options:
    """Read conversations and their pictures once, and report every sample that preprocess.py would skip, with the
    reason and the remedy. Exit status 1 where there is one. Nothing is written but the report."""

    input: tuple[Path, ...]
    """Files of conversations, or directories of them: JSON lists or lines, Parquet, WebDataset tars."""
    image_dir: Path
    """Directory that the pictures' paths begin at; nothing outside it is ever read."""
    family: str
    """Family of models that will train on it, such as `llava`."""
    tokenizer: Path
    """Directory of the llm's tokenizer."""
    format: str = "auto"
    """Of the input: auto (looks into each file), json, parquet or tar."""
    template: str | None = None
    """Conversation format; default: the family's for sft."""
    json: Path | None = None
    """File to write the report to, as JSON."""
    workers: int = 1
    """Processes. The report does not depend on it."""


def main(options: Options) -> bool:
    """Report on standard output; whether every sample can be used. Raises MegammError where none can be looked at."""
    from megamm.registry import family  # imports megatron, which the processes of --workers never need

    model = family(options.family)
    recipe = Recipe(
        image_dir=options.image_dir,
        tokenizer_dir=options.tokenizer,
        template=options.template or model.template,
        marker=model.marker,
    )
    preparer(recipe)  # says now, and not in some process later, what does not fit
    source = Source(list(options.input), options.format)
    found = Audit()
    console = Console(stderr=True)
    report = _Report(options.json)
    with report, processes(options.workers, mpi=False) as pool:
        assert pool is not None
        with progress("check", source.size, console) as advance:
            for bad in audit(source, recipe, pool, found, advance):
                print(f"{bad.where}: {bad.reason}: {bad.message}; {bad.remedy}")
                report.add(bad)
        report.end(found)
    reasons = ", ".join(f"{reason} {count}" for reason, count in Counter(found.bad).most_common()) or "none"
    duplicates = f"; {found.num_duplicate_ids} ids are not the first of their name" if found.num_duplicate_ids else ""
    print(f"{found.num_samples} samples, {found.num_images} pictures; bad: {reasons}{duplicates}")
    return not found.bad


class _Report:
    """The JSON report, written as it goes, so that any number of bad samples fits."""

    def __init__(self, path: Path | None):
        self._path = path

    def __enter__(self) -> "_Report":
        if self._path:
            with writing(self._path):
                self._file = self._path.open("w", encoding="utf-8")
                self._file.write('{"bad": [')
                self._separator = "\n"
        return self

    def add(self, bad: Bad) -> None:
        if self._path:
            with writing(self._path):
                self._file.write(self._separator + json.dumps(bad.as_dict()))
                self._separator = ",\n"

    def end(self, found: Audit) -> None:
        if self._path:
            with writing(self._path):
                self._file.write(f'\n],\n"summary": {json.dumps(found.as_dict())}}}\n')
                self._file.flush()

    def __exit__(self, *_: object) -> None:
        if self._path:
            self._file.close()


if __name__ == "__main__":
    try:
        sys.exit(0 if main(tyro.cli(Options, description=__doc__)) else 1)
    except MegammError as error:
        sys.exit(f"error: {error}")
