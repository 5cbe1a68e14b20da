"""Prove that megamm computes what the authors' code computed, at a layout: one JSON line per case, exit status 1 if any
is not ok. Starts its own ranks; no torchrun."""

import json
import sys
from collections import defaultdict
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import tyro

from megamm.errors import DataError, MegammError
from megamm.verify import Request, compare, outputs_of, verify


@dataclass(frozen=True, kw_only=True)
class Arguments(Request):
    """Verify a Hugging Face checkpoint against recorded results."""

    case: tyro.conf.UseAppendAction[list[str]]
    """A recorded case, .npz; may be given several times."""
    grad_norms: str | None = None
    """JSON {case: {key: norm}}; without it gradients are not compared."""
    atol: float | None = None
    """Replaces the limit of the logits."""
    out: str | None = None
    """Write DIR/<case>.npz with every output, and the norm of every gradient as `grad_norm:<key>`."""


def main() -> int:
    """Run all cases; the exit status."""
    arguments = tyro.cli(Arguments, config=(tyro.conf.FlagCreatePairsOff,))
    try:
        norms = _read_norms(arguments)
        request = Request(**{f.name: getattr(arguments, f.name) for f in fields(Request)})
        all_ok = True
        for case, found in verify(request, arguments.case):
            report = compare(case, found, norms[case.name] if norms else None, arguments.atol)
            print(report.line(), flush=True)
            all_ok = all_ok and report.ok
            if arguments.out:
                _write(Path(arguments.out), case.name, outputs_of(case, found), found)
    except MegammError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0 if all_ok else 1


def _read_norms(arguments: Arguments) -> dict[str, dict[str, float]] | None:
    if arguments.grad_norms is None:
        return None
    try:
        norms = json.loads(Path(arguments.grad_norms).read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"--grad-norms {arguments.grad_norms}: {error}") from error
    names = [Path(path).stem for path in arguments.case]
    if missing := [name for name in names if name not in norms]:
        raise DataError(f"--grad-norms {arguments.grad_norms} has no case {missing[0]}; it has {', '.join(norms)}")
    return defaultdict(dict, norms)


def _write(directory: Path, name: str, outputs: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> None:
    gradients = {key.removeprefix("grad:"): value for key, value in found.items() if key.startswith("grad:")}
    norms = {f"grad_norm:{key}": np.linalg.norm(value.astype(np.float64)) for key, value in gradients.items()}
    directory.mkdir(parents=True, exist_ok=True)
    partial = directory / f"{name}.partial.npz"
    np.savez(partial, **outputs, **norms)
    partial.rename(directory / f"{name}.npz")


if __name__ == "__main__":
    sys.exit(main())
