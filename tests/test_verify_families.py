"""Every reference case of every variant beside LLaVA's, at every layout, through verify."""

import pytest

from megamm.verify import Request, read_model
from tests.cases import check_cases, layout_name
from tests.families import VARIANTS

SP = dict(sequence_parallel=True)
ALL_AT_ONCE = dict(tp=2, pp=2, **SP)
LAYOUTS = [
    ALL_AT_ONCE,
    *(
        pytest.param(layout, marks=pytest.mark.slow)
        for layout in (dict(), dict(tp=2, **SP), dict(pp=2), dict(tp=4, **SP), dict(pp=4))
    ),
]


def request(variant, **layout):
    tower = str(variant.tower) if variant.tower else None
    return Request(hf=str(variant.hf), tower=tower, family=variant.named, **layout)


def check(variant, layout, pool):
    assert len(check_cases(request(variant, **layout), variant.cases, pool, {"expanded_labels"})) >= 4


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_name)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.path)
def test_every_case_equals_the_authors_code(variant, layout, pool):
    check(variant, layout, pool)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.path)
def test_a_cut_inside_the_tower(variant, pool):
    options, _ = read_model(request(variant))
    before, after = "v" * (options.vision.num_layers // 2), "v" * ((options.vision.num_layers + 1) // 2)
    check(variant, dict(pp=2, layout=f"V{before}|{after}PE{'t' * options.llm.num_layers}L"), pool)
