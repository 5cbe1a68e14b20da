"""The table of parity: every reference case of every variant at every layout, worst differences as a table and JSON.

Runs what tools/checkpoint/verify.py runs, on ranks that are started once for all layouts.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from megamm.errors import MegammError
from megamm.parallel.launch import RankPool
from megamm.registry import FAMILIES
from megamm.verify import Request, compare, verify

MAX_RANKS = 8
SIZES = ((1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (4, 2), (1, 4), (2, 4))
"""(tp, pp), at most MAX_RANKS ranks."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Compare with the authors' results at every layout."""

    golden: Path = Path("tests/golden")
    """Folder with FAMILY/VARIANT/{hf,cases,grad_norms.json}."""
    out: Path | None = None
    """Write the rows as JSON to this file."""


def layouts(cuts: dict[int, list[str]]) -> list[dict]:
    """Every (tp, pp), sequence parallel on and off, the balanced cut and the unusual ones."""
    return [
        dict(tp=tp, pp=pp, sequence_parallel=sp, layout=layout)
        for tp, pp in SIZES
        for sp in ((False, True) if tp > 1 else (False,))
        for layout in ["auto", *cuts.get(pp, [])]
    ]


CUTS = {
    "llava": {
        2: ["Vv|vvPEtttL", "Vvvv|PEtttL", "Vv|vvPE|t|ttL"],
        4: ["V|vv|vPEt|ttL", "Vvvv|PE|tt|tL"],
    },
    "imp": {
        2: ["Vv|vvvPEtttL", "Vvvvv|PEtttL", "Vv|vvvPE|t|ttL"],
        4: ["V|vvv|vPEt|ttL", "Vvvvv|PE|tt|tL"],
    },
    "mplug_owl3": {
        2: ["Vv|vPEttttL", "Vvv|PEttttL", "Vv|vPE|t|tttL"],
        4: ["V|v|vPEtt|ttL", "VvvPEtt|t|t|L"],
    },
}
"""Unusual cuts by family and pp: inside the tower, the tower alone, virtual stages."""


def main() -> int:
    """Run all; 0 if every row is ok."""
    arguments = tyro.cli(Arguments)
    rows = []
    with RankPool(MAX_RANKS) as pool:
        found = (path for name in FAMILIES for path in sorted(arguments.golden.glob(f"{name}/*/grad_norms.json")))
        for norms_path in found:
            variant = norms_path.parent
            norms = json.loads(norms_path.read_text())
            cases = sorted((variant / "cases").glob("*.npz"))
            for layout in layouts(CUTS[variant.parent.name]):
                request = Request(hf=str(variant / "hf"), **layout)
                reports = [compare(case, found, norms[case.name]) for case, found in verify(request, cases, pool)]
                rows.append(
                    {
                        "variant": f"{variant.parent.name}/{variant.name}",
                        **layout,
                        "cases": len(reports),
                        "logits": max(report.differences["logits"] for report in reports),
                        "loss": max(abs(report.loss - report.expected_loss) for report in reports),
                        "gradient": max(report.gradient or 0.0 for report in reports),
                        "ok": all(report.ok for report in reports),
                    }
                )
                print(json.dumps(rows[-1]), flush=True)
    show(rows)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n")
    return 0 if all(row["ok"] for row in rows) else 1


def show(rows: list[dict]) -> None:
    """One line per variant and (tp, pp): the worst of its layouts."""
    table = Table("variant", "tp", "pp", "layouts", "logits", "loss", "gradient norm", "ok")
    for variant in dict.fromkeys(row["variant"] for row in rows):
        for tp, pp in SIZES:
            same = [row for row in rows if (row["variant"], row["tp"], row["pp"]) == (variant, tp, pp)]
            worst = [f"{max(row[key] for row in same):.1e}" for key in ("logits", "loss", "gradient")]
            ok = "yes" if all(row["ok"] for row in same) else "NO"
            table.add_row(variant, str(tp), str(pp), str(len(same)), *worst, ok)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MegammError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
