"""The command line: `torchrun --nproc-per-node N -m megamm.train RECIPE.py [--parallel.tp 2 ...] [--dry-run]`.

Recipe and overrides -> checks -> backend -> groups -> loop. No training logic here.
"""

import re
import sys
import time
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from megamm import backend
from megamm.config.frozen import TEXT_WAY, is_frozen, num_frozen_layers
from megamm.config.load import parse
from megamm.config.schema import Config
from megamm.errors import MegammError
from megamm.parallel import groups
from megamm.parallel.placement import step_flops
from megamm.training.loop import run
from megamm.training.setup import Plan, plan

PATIENCE_S = 10.0
"""How much later than another rank the first one may be to find the same error."""


def main(argv: Sequence[str]) -> int:
    """Train, or print the dry run; the exit status. A MegammError is printed once, without a traceback."""
    groups.end_with_torchrun()
    try:
        config, options = parse(argv)
        world_size = groups.world_size()
        if options.dry_run:
            world_size = max(world_size, config.parallel.tp * config.parallel.pp)
            show(config, plan(config, world_size, needs_files=False), world_size)
            return 0
        found = plan(config, world_size)
        backend.start(config.train.backend, groups.local_rank()).check_precision(config.train.precision)
        groups.start_distributed()
        run(config, found, groups.start(config.parallel, found.layout, config.train.seed))
        groups.stop()
    except (MegammError, OSError) as error:  # OSError: a full disk, say; it names the file
        _let_first_speak()
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except SystemExit as stop:  # a wrong option; rank 0 has printed it, or is about to
        if stop.code:
            _let_first_speak()
        raise
    return 0


def _let_first_speak() -> None:
    """Wait, on other ranks than the first, to be stopped.

    Most errors are found by all ranks alike. torchrun stops every rank when one has ended, so that a faster one would
    silence rank 0 before it has said what is wrong. Who is still there afterwards has an error of its own to tell.
    """
    if not groups.is_first():
        time.sleep(PATIENCE_S)


def show(config: Config, found: Plan, world_size: int) -> None:
    """Print units per stage, parameters by part, a memory estimate and samples per step."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    costs = dict(zip((unit.name for unit in found.units), costs_of(config, found), strict=True))
    total = sum(costs.values()) or 1.0
    table = Table(title=f"{config.model.family}: {found.layout.notation()}", title_justify="left")
    for name in ("stage", "units", "parameters", "FLOPs", "memory per rank, estimated"):
        table.add_column(name, justify="left" if name == "units" else "right")
    for k, stage in enumerate(found.layout.stages):
        share = sum(costs[unit.name] for unit in stage.units) / total
        table.add_row(
            f"{k} (pp rank {stage.pp_rank})",
            " ".join(_runs([unit.name for unit in stage.units])),
            f"{sum(unit.parameters for unit in stage.units):,}",
            f"{share:.1%}",
            f"{memory_bytes(config, found, k) / 2**30:.2f} GiB",
        )
    console.print(table)
    parts = Table(title="parameters by part", title_justify="left")
    for name in ("part", "parameters", "trained"):
        parts.add_column(name, justify="left" if name == "part" else "right")
    for part in dict.fromkeys(unit.part for unit in found.units):
        number = sum(unit.parameters for unit in found.units if unit.part == part)
        layers = num_frozen_layers(part, config.train.freeze)
        trained = "frozen" if part in config.train.freeze else f"from layer {layers}" if layers else "yes"
        if part == "llm" and TEXT_WAY in config.train.freeze:
            trained = "the visual way"
        parts.add_row(part, f"{number:,}", trained)
    guests = dict.fromkeys(guest for unit in found.units for guest in unit.guests)
    for frozen, trained in ((True, "frozen"), (False, "yes")):
        for name in _runs([guest for guest in guests if is_frozen(guest, config.train.freeze) == frozen]):
            parts.add_row(name, "among these", trained)
    parts.add_row("all", f"{sum(unit.parameters for unit in found.units):,}", "")
    console.print(parts)
    accumulate = config.train.global_batch // (config.train.micro_batch * found.dp)
    console.print(
        f"{world_size} ranks = tp {config.parallel.tp} x pp {config.parallel.pp} x dp {found.dp}; "
        f"{config.train.global_batch} {'sequences' if config.data.packing else 'samples'} per step = "
        f"{config.train.micro_batch} per micro-batch x {accumulate} micro-batches x {found.dp} replicas"
    )
    samples = "unknown: no dataset there" if found.num_samples is None else f"{found.num_samples:,}"
    if found.packs is not None:
        samples += f" in {len(found.packs):,} sequences"
    steps = f"{found.num_steps:,}" if found.num_steps else "unknown"
    unit = "sequence" if config.data.packing else "sample"
    console.print(f"samples {samples}; steps {steps}; at most {config.data.max_tokens} tokens per {unit}")


def costs_of(config: Config, found: Plan) -> list[float]:
    """FLOPs of each unit, forward and backward, for a mean micro-batch."""
    return step_flops(found.units, config.train.freeze, config.train.recompute == "full")


def memory_bytes(config: Config, found: Plan, stage_number: int) -> float:
    """Estimated bytes on a rank of that stage: weights, gradients, optimizer state, kept activations.

    Activations: of as many micro-batches as 1F1B holds at once on that stage. With recomputation only each layer's
    input is kept, counted as an eighth of what it keeps otherwise.
    """
    stage = list(found.layout.stages)[stage_number]
    tp, dp, frozen = config.parallel.tp, found.dp, config.train.freeze
    weight_bytes = 4 if config.train.precision == "fp32" else 2
    weights = sum(unit.parameters for unit in stage.units) / tp
    trained = sum(unit.parameters for unit in stage.units if unit.is_trained(frozen)) / tp
    # float32 gradients; the two moments, and a float32 copy of the weights where they are not float32 themselves.
    state = 8 if weight_bytes == 4 else 12
    in_flight = min(found.layout.pp - stage.pp_rank, config.train.global_batch // (config.train.micro_batch * found.dp))
    kept = sum(unit.activation_bytes for unit in stage.units) / tp
    if config.train.recompute == "full":
        kept /= 8
    return weights * weight_bytes + trained * (4 + state / dp) + kept * max(in_flight, 1)


def _runs(names: list[str]) -> list[str]:
    """`vision.layer.3 vision.layer.4` -> `vision.layer.3-4`."""
    out: list[tuple[str, str, str, str]] = []
    for name in names:
        found = re.fullmatch(r"(\D*)(\d*)(.*)", name)
        assert found is not None  # whatever the name
        before, number, behind = found.groups()
        first = number
        if out and number and out[-1] == (before, out[-1][1], str(int(number) - 1), behind):
            first = out.pop()[1]
        out.append((before, first, number, behind))
    return [f"{a}{first}{b}" if first == last else f"{a}{first}-{last}{b}" for a, first, last, b in out]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
