"""The table of parity: every reference case of every variant at many layouts, worst differences as a table and JSON.

Runs what tools/checkpoint/verify.py runs, on ranks that are started once for all layouts.
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from megamm.errors import ConfigError, MegammError
from megamm.models.build import units
from megamm.parallel.launch import RankPool
from megamm.registry import FAMILIES
from megamm.verify import Request, compare, read_model, verify

MAX_RANKS = 8


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Compare with the authors' results at every layout."""

    golden: Path = Path("tests/golden")
    """Folder with FAMILY/VARIANT/{hf,cases,grad_norms.json}."""
    out: Path | None = None
    """Write the rows as JSON to this file."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """A layout of the table."""

    title: str
    tp: int = 1
    pp: int = 1
    cut: Callable[[str], str] | None = None
    """The symbols of all units -> a layout; None: balanced."""


def _in_the_tower(symbols: str) -> str:
    """Two stages, the first holds the embedding and one block of the tower."""
    return f"{symbols[:2]}|{symbols[2:]}"


def _tower_alone(symbols: str) -> str:
    """Two stages, the first holds the tower and nothing else."""
    projector = symbols.index("P")
    return f"{symbols[:projector]}|{symbols[projector:]}"


def _interleaved(symbols: str) -> str:
    """Two ranks with two stages each, cut in the tower, in the llm, and in front of the head."""
    middle = symbols.index("t") + 1
    return f"{symbols[:2]}|{symbols[2:middle]}|{symbols[middle:-1]}|{symbols[-1]}"


COLUMNS = (
    Column(title="1 1"),
    Column(title="2 1", tp=2),
    Column(title="4 1", tp=4),
    Column(title="1 2", pp=2),
    Column(title="1 2 cut in tower", pp=2, cut=_in_the_tower),
    Column(title="1 2 tower alone", pp=2, cut=_tower_alone),
    Column(title="1 2 interleaved", pp=2, cut=_interleaved),
    Column(title="2 2", tp=2, pp=2),
    Column(title="1 4", pp=4),
    Column(title="4 2", tp=4, pp=2),
    Column(title="2 4", tp=2, pp=4),
)
"""tp, pp, and the cut; sequence parallel wherever tp is more than 1."""


def variants(golden: Path) -> Iterator[tuple[str, Path]]:
    """(family, folder) of every variant that there is."""
    for folder in sorted(path.parent for path in golden.glob("*/*/grad_norms.json")):
        special = f"{folder.parent.name}_{folder.name}"  # one that cannot be recognised, and so has a name
        yield special if special in FAMILIES else folder.parent.name, folder


def measure(name: str, folder: Path, column: Column, pool: RankPool) -> dict:
    """All cases of one variant at one layout: the worst differences."""
    norms = json.loads((folder / "grad_norms.json").read_text())
    cases = sorted((folder / "cases").glob("*.npz"))
    request = Request(hf=str(folder / "hf"), family=name, tp=column.tp, pp=column.pp, sequence_parallel=column.tp > 1)
    if column.cut is not None:
        options, _ = read_model(request)
        symbols = "".join(unit.symbol for unit in units(options, num_tokens=1, num_images=1, seq_length=1))
        request = replace(request, layout=column.cut(symbols))
    reports = [compare(case, found, norms[case.name]) for case, found in verify(request, cases, pool)]
    return {
        "variant": f"{folder.parent.name}/{folder.name}",
        "column": column.title,
        "layout": request.layout,
        "cases": len(reports),
        "logits": max(report.differences["logits"] for report in reports),
        "loss": max(abs(report.loss - report.expected_loss) for report in reports),
        "gradient": max(report.gradient or 0.0 for report in reports),
        "ok": all(report.ok for report in reports),
    }


def main() -> int:
    """Run all; 0 if every row is ok."""
    arguments = tyro.cli(Arguments)
    rows = []
    with RankPool(MAX_RANKS) as pool:
        for name, folder in variants(arguments.golden):
            for column in COLUMNS:
                try:
                    rows.append(measure(name, folder, column, pool))
                except ConfigError as error:  # heads or groups that tp does not divide
                    variant = f"{folder.parent.name}/{folder.name}"
                    rows.append({"variant": variant, "column": column.title, "refused": error.problems[0]})
                print(json.dumps(rows[-1]), flush=True)
    show(rows)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n")
    return 0 if all(row.get("ok", True) for row in rows) else 1


def show(rows: list[dict]) -> None:
    """A line per variant: the worst difference of a logit at each layout; of loss and gradients over all of them."""
    table = Table("variant", *(column.title for column in COLUMNS), "loss", "gradient norm", "ok")
    for variant in dict.fromkeys(row["variant"] for row in rows):
        same = {row["column"]: row for row in rows if row["variant"] == variant}
        ran = [row for row in same.values() if "ok" in row]
        cells = [
            f"{same[column.title]['logits']:.1e}" if "ok" in same[column.title] else "refused" for column in COLUMNS
        ]
        worst = [f"{max(row[key] for row in ran):.1e}" for key in ("loss", "gradient")]
        table.add_row(variant, *cells, *worst, "yes" if all(row["ok"] for row in ran) else "NO")
    Console(width=None if sys.stdout.isatty() else 200).print(table)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MegammError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
