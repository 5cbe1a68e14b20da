"""Sizes that a layout does not divide are told all at once, with what is legal."""

import pytest

from megamm.config import Parallel
from megamm.errors import ConfigError
from megamm.parallel.check import Sizes, check_sizes
from megamm.parallel.placement import Unit

LLM = Sizes(heads=12, groups=4, ffn=48, vocab=384)
VISION = Sizes(heads=6, ffn=24)
NAMES = ("vision.embed", "vision.layer.0", "projector", "llm.embed", "llm.layer.0", "llm.head")
UNITS = [Unit(name, 1, 1, 1) for name in NAMES]


def check(parallel: Parallel) -> None:
    check_sizes(parallel, {"vision": VISION, "llm": LLM}, UNITS)


def problems(parallel: Parallel) -> list[str]:
    with pytest.raises(ConfigError) as error:
        check(parallel)
    return error.value.problems


@pytest.mark.parametrize("tp", [1, 2])
def test_legal_sizes_pass(tp: int) -> None:
    check(Parallel(tp=tp, pp=6))
    check(Parallel(tp=tp, pp=2, layout="VvP|EtL"))


def test_groups_may_be_fewer_than_ranks_but_must_fit() -> None:
    check_sizes(Parallel(tp=8), {"llm": Sizes(heads=8, groups=4)}, UNITS)
    with pytest.raises(ConfigError, match="4 key/value groups, neither a multiple nor a divisor; legal.*: 1, 2, 4, 12"):
        check_sizes(Parallel(tp=6), {"llm": Sizes(heads=12, groups=4)}, UNITS)


def test_each_size_that_does_not_fit_is_named() -> None:
    (problem,) = problems(Parallel(tp=5))
    for text in ("vision has 6 attention heads", "llm has 12 attention", "48 columns", "384 rows", "4 key/value"):
        assert text in problem
    assert problem.endswith("legal for this model: 1, 2")


def test_heads_and_layout_are_told_together() -> None:
    assert len(problems(Parallel(tp=5, pp=7))) == 2
    first, *rest = problems(Parallel(tp=4, pp=2, layout="Vv|PEtt"))
    assert "vision has 6 attention heads, not divisible" in first
    assert any("the cut has" in problem for problem in rest)
    assert problems(Parallel(tp=0)) == ["parallel.tp=0, parallel.pp=1: both must be 1 or more"]
