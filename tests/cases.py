"""Reference cases, run at a layout and compared with what the authors' code computed."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path

from megamm.parallel.launch import RankPool
from megamm.verify import Report, Request, compare, verify


def check_cases(
    request: Request, cases: Sequence[Path], pool: RankPool, needed: Collection[str] = ()
) -> dict[str, Report]:
    """Every case is equal, its gradient norms included, which stand beside the folder of the cases, and the outputs
    `needed` were compared -> reports by the name of the case."""
    norms = json.loads((cases[0].parents[1] / "grad_norms.json").read_text())
    reports = {}
    for case, found in verify(request, cases, pool):
        report = compare(case, found, norms[case.name])
        assert report.ok, report.line()
        assert {"logits", "loss", "layer_outputs", *needed} <= report.differences.keys(), report.line()
        reports[case.name] = report
    assert [*reports] == [path.stem for path in cases]
    return reports


def layout_name(layout: dict) -> str:
    """A layout in the name of a test."""
    return " ".join(f"{k}={v}" for k, v in layout.items()) or "one rank"
