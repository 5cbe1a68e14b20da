"""The flat list of units, and how it is cut into pipeline stages. Pure arithmetic on names and numbers.

A model is one list of units: `vision.embed`, `vision.layer.0` ..., `projector`, `llm.embed`, `llm.layer.0` ...,
`llm.head`. A layout assigns contiguous runs of it to the stages of the pipeline, and may cut anywhere, inside the tower
too. Models fill the list; the automatic cut, the dry run and the meter read it. No process groups or modules here.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, groupby
from math import inf

from megamm.config.frozen import is_frozen
from megamm.config.schema import Parallel
from megamm.errors import ConfigError

SYMBOLS = {
    "vision.embed": "V",
    "vision.layer": "v",
    "projector": "P",
    "llm.embed": "E",
    "llm.layer": "t",
    "llm.head": "L",
}
"""Symbol of each kind of unit in the notation of a cut."""


@dataclass(frozen=True, slots=True)
class Unit:
    """One piece of the model that is never cut by the pipeline."""

    name: str
    """Its global name, such as `vision.embed`, `vision.layer.3`, `projector`, `llm.layer.0`."""
    flops: float
    """FLOPs of the forward pass of one micro-batch, over all tensor parallel ranks."""
    parameters: int
    """Weights, over all tensor parallel ranks."""
    activation_bytes: int
    """Bytes kept from the forward to the backward pass of one micro-batch, over all tensor parallel ranks."""
    guests: tuple[str, ...] = ()
    """Further parts that have weights in this unit."""

    @property
    def part(self) -> str:
        """The part of the model it belongs to: vision, projector or llm."""
        return self.name.split(".")[0]

    def is_trained(self, frozen: Collection[str]) -> bool:
        """Whether it has weights that `frozen`, as `train.freeze` says it, leaves to train."""
        return bool(self.parameters) and not all(is_frozen(name, frozen) for name in (self.name, *self.guests))

    @property
    def symbol(self) -> str:
        """Its letter in the notation of a cut."""
        return SYMBOLS[self.name.rstrip("0123456789").rstrip(".")]


@dataclass(frozen=True, slots=True)
class Stage:
    """The run of units that one pipeline rank holds as one virtual stage."""

    pp_rank: int
    vp_stage: int
    units: tuple[Unit, ...]
    earlier: tuple[Unit, ...]
    """All units in front of it; empty on the first stage."""
    later: tuple[Unit, ...]
    """All units behind it; empty on the last stage."""

    def has(self, name: str) -> bool:
        """True if the unit of that name lives here."""
        return any(unit.name == name for unit in self.units)

    @property
    def vision_layers(self) -> range:
        """Global numbers of the tower's layers that live here; may be empty."""
        return self._layers("vision.layer.")

    @property
    def llm_layers(self) -> range:
        """Global numbers of the llm's layers that live here; may be empty."""
        return self._layers("llm.layer.")

    def _layers(self, prefix: str) -> range:
        numbers = [int(unit.name.removeprefix(prefix)) for unit in self.units if unit.name.startswith(prefix)]
        return range(numbers[0], numbers[-1] + 1) if numbers else range(0)


@dataclass(frozen=True, slots=True)
class Layout:
    """A cut: one contiguous, non-empty run of units for every stage.

    Runs stand in pipeline order: run k belongs to pipeline rank `k % pp` and virtual stage `k // pp`.
    """

    runs: tuple[tuple[Unit, ...], ...]
    pp: int

    @property
    def virtual(self) -> int:
        """Virtual stages per pipeline rank; 1 without interleaving."""
        return len(self.runs) // self.pp

    @property
    def stages(self) -> Iterator[Stage]:
        """All stages, in pipeline order."""
        return (self.stage(k % self.pp, k // self.pp) for k in range(len(self.runs)))

    def stage(self, pp_rank: int, vp_stage: int = 0) -> Stage:
        """What one pipeline rank holds as one of its virtual stages."""
        k = vp_stage * self.pp + pp_rank
        earlier, later = chain.from_iterable(self.runs[:k]), chain.from_iterable(self.runs[k + 1 :])
        return Stage(pp_rank, vp_stage, self.runs[k], tuple(earlier), tuple(later))

    def find(self, name: str) -> Stage:
        """The stage that holds the unit of that name."""
        return next(stage for stage in self.stages if stage.has(name))

    def notation(self) -> str:
        """The cut as text, such as `Vv*24P|Et*16|t*16L`; `parse_layout` reads it back."""
        return "|".join(
            "".join(
                symbol if count == 1 else f"{symbol}*{count}"
                for symbol, count in ((symbol, len(list(same))) for symbol, same in groupby(u.symbol for u in run))
            )
            for run in self.runs
        )

    def mcore_layout(self, part: str) -> list[list[str]]:
        """What megatron-core's `pipeline_model_parallel_layout` must be for the transformer of `vision` or `llm`.

        Layer numbers and checkpoint keys then come out global on every stage. megatron-core only looks at the flattened
        list: `embedding` first, `loss` last. For the tower they stand where the tower begins and where the projector
        lives. The llm's config is checked more strictly, so they stand in the first and last entry wherever `llm.embed`
        and `llm.head` really live.
        """
        layout = [["decoder" for unit in run if unit.name.startswith(f"{part}.layer.")] for run in self.runs]
        if part == "llm":
            first, last = 0, len(self.runs) - 1
        else:
            first, last = (self._index(f"{part}.embed"), self._index("projector"))
        layout[first].insert(0, "embedding")
        layout[last].append("loss")
        return layout

    def _index(self, name: str) -> int:
        return next(k for k, run in enumerate(self.runs) if any(unit.name == name for unit in run))


def step_flops(units: Sequence[Unit], frozen: Collection[str], recompute: bool = False) -> list[float]:
    """FLOPs of the forward and backward pass of one micro-batch, of each unit.

    frozen: what is not trained, as `train.freeze` says it. recompute: whether the forward pass is run again in
    the backward pass. A backward pass costs one forward for the gradient of the weights, where they are trained, and
    one for the gradient of the input, where something before it is trained.
    """
    costs = []
    trained_before = False
    for unit in units:
        trained = unit.is_trained(frozen)
        passes = trained + trained_before
        costs.append(unit.flops * (1 + passes + (recompute and passes > 0)))
        trained_before = trained_before or trained
    return costs


def auto_layout(
    units: Sequence[Unit], pp: int, frozen: Collection[str] = (), virtual: int = 1, recompute: bool = False
) -> Layout:
    """The cut whose most expensive stage costs the fewest FLOPs, forward and backward.

    Of all such cuts, the one with the smallest sum of squared stage costs, so that the other stages are balanced, too;
    of those, the one that cuts earliest. Arguments as in `step_flops`. Raises ConfigError if there are more stages than
    units.
    """
    count = pp * virtual
    _check_stages(units, pp, count)
    total = list(accumulate(step_flops(units, frozen, recompute), initial=0.0))
    ends = range(len(units) + 1)

    # peak[end]: the lowest possible cost of the most expensive stage when the first `end` units fill the stages so far.
    peak = [0.0] + [inf] * len(units)
    for _ in range(count):
        peak = [min((max(peak[cut], total[end] - total[cut]) for cut in range(end)), default=inf) for end in ends]
    limit = peak[-1]

    # Again, within that limit: the smallest sum of squares, and for each stage count and end the cut that gives it.
    squares = [0.0] + [inf] * len(units)
    cuts: list[list[int]] = []
    for _ in range(count):
        best = [
            min(
                (
                    (squares[cut] + (total[end] - total[cut]) ** 2, cut)
                    for cut in range(end)
                    if total[end] - total[cut] <= limit
                ),
                default=(inf, 0),
            )
            for end in ends
        ]
        squares = [value for value, _ in best]
        cuts.append([cut for _, cut in best])

    runs: list[tuple[Unit, ...]] = []
    end = len(units)
    for stage_cuts in reversed(cuts):
        runs.append(tuple(units[stage_cuts[end] : end]))
        end = stage_cuts[end]
    return Layout(tuple(reversed(runs)), pp)


def choose_layout(
    parallel: Parallel, units: Sequence[Unit], frozen: Collection[str] = (), recompute: bool = False
) -> Layout:
    """The cut that `parallel.layout` names, or the balanced one. Raises ConfigError."""
    if parallel.layout == "auto":
        return auto_layout(units, parallel.pp, frozen, parallel.virtual_stages, recompute)
    return parse_layout(parallel.layout, units, parallel.pp)


def parse_layout(text: str, units: Sequence[Unit], pp: int) -> Layout:
    """Read a cut such as `Vv*24P|Et*16|t*16L`.

    V vision.embed, v a vision layer, P projector, E llm.embed, t an llm layer, L llm.head; `x*3` repeats a unit,
    `(...)*3` a group, `|` starts the next stage; commas and spaces are cosmetic. A multiple of pp stages gives virtual
    stages. Raises ConfigError with everything that is wrong and a legal cut of this model.
    """
    _check_stages(units, pp, pp)
    example = f"a legal cut of this model at parallel.pp={pp} is {auto_layout(units, pp).notation()}"
    # No legal cut is longer than one separator beside each unit: a bound for what repetition may produce.
    stages = _expand(text, longest=2 * len(units)).split("|")
    problems = []

    wanted = "".join(unit.symbol for unit in units)
    found = "".join(stages)
    if Counter(found) != Counter(wanted):
        problems.append(f"parallel.layout={text}: the model has {_counts(wanted)}; the cut has {_counts(found)}")
    elif found != wanted:
        at = next(i for i, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b)
        problems.append(
            f"parallel.layout={text}: units out of order: unit {at + 1} must be {wanted[at]} ({units[at].name}), "
            f"not {found[at]}; the order is V v P E t L"
        )
    if len(stages) % pp or (pp == 1 and len(stages) > 1):
        legal = "1 stage" if pp == 1 else f"{pp} stages, or a multiple of it for virtual stages"
        problems.append(f"parallel.layout={text}: {len(stages)} stages; parallel.pp={pp} needs {legal}")
    if not all(stages):
        empty = ", ".join(str(k + 1) for k, stage in enumerate(stages) if not stage)
        problems.append(f"parallel.layout={text}: stage {empty} is empty; every stage needs at least one unit")
    if problems:
        raise ConfigError([*problems, example])

    ends = list(accumulate((len(stage) for stage in stages), initial=0))
    return Layout(tuple(tuple(units[a:b]) for a, b in zip(ends, ends[1:], strict=False)), pp)


def _check_stages(units: Sequence[Unit], pp: int, count: int) -> None:
    if pp < 1 or count > len(units):
        legal = f"it has {len(units)} units: legal is 1 to {len(units)}"
        raise ConfigError([f"parallel.pp={pp} cuts the model into {count} stages; {legal}"])


def _counts(symbols: str) -> str:
    counts = Counter(symbols)
    return ", ".join(f"{symbol} {counts[symbol]}" for symbol in SYMBOLS.values())


_TOKEN = re.compile(r"([VvPEtL|)])(?:\*([1-9]\d{0,8}))?|\(")


def _expand(text: str, longest: int) -> str:
    """The notation with every repetition written out: one character per unit, and the separators."""
    rest = re.sub(r"[,\s]", "", text)
    groups = [""]  # what stands in the open parentheses so far, outermost first
    while rest:
        token = _TOKEN.match(rest)
        if token is None or (token[1] == ")" and len(groups) == 1):
            raise _unreadable(text, f"cannot read it from {rest!r} on")
        if token[0] == "(":
            groups.append("")
        else:
            item = groups.pop() if token[1] == ")" else token[1]
            groups[-1] += item * min(int(token[2] or 1), longest + 1)
            if len(groups[-1]) > longest:
                raise _unreadable(text, "it repeats far more units than the model has")
        rest = rest[token.end() :]
    if len(groups) > 1:
        raise _unreadable(text, "a ( is never closed")
    return groups[0]


def _unreadable(text: str, reason: str) -> ConfigError:
    return ConfigError([f"parallel.layout={text}: {reason}; write it like Vv*24P|Et*16|t*16L, groups as (t*4|)*3"])
