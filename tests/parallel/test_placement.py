"""The cut of the flat list: notation, optimality, and what megatron-core makes of it."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from megamm.errors import ConfigError
from megamm.parallel.placement import Layout, Unit, auto_layout, parse_layout, step_flops


def flat_list(vision_layers: int, llm_layers: int, flops: list[int] | None = None) -> list[Unit]:
    names = [
        "vision.embed",
        *(f"vision.layer.{i}" for i in range(vision_layers)),
        "projector",
        "llm.embed",
        *(f"llm.layer.{i}" for i in range(llm_layers)),
        "llm.head",
    ]
    flops = flops or [1] * len(names)
    return [Unit(name, cost, 10, 100) for name, cost in zip(names, flops, strict=True)]


@st.composite
def unit_lists(draw: st.DrawFn, max_layers: int = 4) -> list[Unit]:
    layers = draw(st.integers(1, max_layers)), draw(st.integers(1, max_layers))
    count = sum(layers) + 4
    return flat_list(*layers, draw(st.lists(st.integers(0, 20), min_size=count, max_size=count)))


def cut(units: list[Unit], ends: tuple[int, ...], pp: int) -> Layout:
    bounds = [0, *ends, len(units)]
    return Layout(tuple(tuple(units[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)), pp)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[Unit], Layout]:
    units = draw(unit_lists())
    pp = draw(st.integers(1, len(units)))
    virtual = draw(st.integers(1, len(units) // pp)) if pp > 1 else 1
    inner = range(1, len(units))
    ends = draw(st.lists(st.sampled_from(inner), min_size=pp * virtual - 1, max_size=pp * virtual - 1, unique=True))
    return units, cut(units, tuple(sorted(ends)), pp)


def stage_costs(layout: Layout, costs: list[float]) -> list[float]:
    remaining = iter(costs)
    return [sum(next(remaining) for _ in run) for run in layout.runs]


@given(layouts())
def test_notation_reads_back(case: tuple[list[Unit], Layout]) -> None:
    units, layout = case
    assert parse_layout(layout.notation(), units, layout.pp) == layout


@given(unit_lists(), st.integers(1, 4), st.sets(st.sampled_from(["vision", "projector", "llm"])), st.booleans())
def test_auto_is_optimal(units: list[Unit], stages: int, frozen: set[str], recompute: bool) -> None:
    costs = step_flops(units, frozen, recompute)
    every_cut = [cut(units, ends, stages) for ends in combinations(range(1, len(units)), stages - 1)]
    ranked = [(max(c), sum(x * x for x in c)) for c in (stage_costs(layout, costs) for layout in every_cut)]
    found = stage_costs(auto_layout(units, stages, frozen, recompute=recompute), costs)
    assert (max(found), sum(x * x for x in found)) == min(ranked)


@given(layouts())
def test_megatron_core_numbers_the_layers_as_we_do(case: tuple[list[Unit], Layout]) -> None:
    units, layout = case
    for part in ("vision", "llm"):
        theirs = PipelineParallelLayerLayout(layout.mcore_layout(part), layout.pp)
        theirs.validate_layer_layout(sum(u.name.startswith(f"{part}.layer") for u in units), None)
        assert theirs.virtual_pipeline_model_parallel_size == layout.virtual
        for stage in layout.stages:
            entries = theirs.layout[stage.pp_rank][stage.vp_stage]
            ours = stage.vision_layers if part == "vision" else stage.llm_layers
            assert entries.count(LayerType.decoder) == len(ours)
            if part == "vision":
                assert (LayerType.embedding in entries) == stage.has("vision.embed")
                assert (LayerType.loss in entries) == stage.has("projector")
    assert layout.mcore_layout("llm")[0][0] == "embedding"
    assert layout.mcore_layout("llm")[-1][-1] == "loss"


def test_stage_knows_what_it_holds_and_its_neighbours() -> None:
    units = flat_list(4, 4)
    layout = parse_layout("Vv*3 | vPEt | t*2, | tL", units, pp=2)
    assert layout.virtual == 2
    stage = layout.stage(1, 0)
    assert [unit.name for unit in stage.units] == ["vision.layer.3", "projector", "llm.embed", "llm.layer.0"]
    assert (stage.vision_layers, stage.llm_layers) == (range(3, 4), range(1))
    assert (stage.earlier[-1].name, stage.later[0].name) == ("vision.layer.2", "llm.layer.1")
    assert layout.stage(0, 0).earlier == ()
    assert layout.stage(1, 1).later == ()
    assert len(layout.stage(0, 1).vision_layers) == 0
    assert layout.find("llm.head") == layout.stage(1, 1)


def test_groups_and_repetitions_are_cosmetic() -> None:
    units = flat_list(2, 6)
    assert parse_layout("Vv*2PE(|t*2)*3L", units, 4) == parse_layout("VvvPE|tt|tt|ttL", units, 4)
    assert parse_layout("(Vv*2P),E|((tt)*3)L", units, 2) == parse_layout("VvvPE|ttttttL", units, 2)


def test_backward_costs_follow_what_is_trained() -> None:
    units = flat_list(2, 2)  # V v v P E t t L
    assert step_flops(units, ()) == [2, 3, 3, 3, 3, 3, 3, 3]
    assert step_flops(units, {"vision"}) == [1, 1, 1, 2, 3, 3, 3, 3]
    assert step_flops(units, {"vision", "llm"}) == [1, 1, 1, 2, 2, 2, 2, 2]
    assert step_flops(units, {"vision", "llm"}, recompute=True) == [1, 1, 1, 3, 3, 3, 3, 3]
    assert step_flops(units, {"vision[:1]"}) == [1, 1, 2, 3, 3, 3, 3, 3]
    assert step_flops(units, {"vision", "projector", "llm[:1]"}) == [1, 1, 1, 1, 1, 1, 2, 3]


def test_frozen_parts_move_the_cut() -> None:
    units = flat_list(8, 8)
    assert auto_layout(units, 2).notation() == "Vv*8P|Et*8L"
    assert auto_layout(units, 2, {"vision"}).notation() == "Vv*8PEt*2|t*6L"


@pytest.mark.parametrize(
    ("text", "pp", "expected"),
    [
        ("Vv*2P|Et*3L", 2, "the model has V 1, v 2, P 1, E 1, t 4, L 1; the cut has V 1, v 2, P 1, E 1, t 3, L 1"),
        ("Vv*2E|Pt*4L", 2, "unit 4 must be P (projector), not E"),
        ("Vv*2P|Et*4L", 4, "2 stages; parallel.pp=4 needs 4 stages, or a multiple of it for virtual stages"),
        ("Vv*2P|Et*4L", 1, "2 stages; parallel.pp=1 needs 1 stage"),
        ("Vv*2P||Et*2|t*2L", 4, "stage 2 is empty"),
        ("Vv*2P|Ex*4L", 2, "cannot read it from 'x*4L' on"),
        ("Vv*2P|Et*0L", 2, "cannot read it from '*0L' on"),
        ("Vv*2P)|Et*4L", 2, "cannot read it from ')|Et*4L' on"),
        ("Vv*2P|(Et*4L", 2, "a ( is never closed"),
        ("Vv*2P|E((t*99999)*99999)*99999L", 2, "it repeats far more units than the model has"),
        ("", 2, "the cut has V 0, v 0"),
    ],
)
def test_a_wrong_cut_is_explained(text: str, pp: int, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_layout(text, flat_list(2, 4), pp)
    assert expected in str(error.value)
    assert "Vv*2" in str(error.value)


def test_every_problem_of_a_cut_is_told_with_a_legal_one() -> None:
    with pytest.raises(ConfigError) as error:
        parse_layout("Vv*2P||Et*3L", flat_list(2, 4), 2)
    assert len(error.value.problems) == 4
    assert error.value.problems[-1].endswith("at parallel.pp=2 is Vv*2PE|t*4L")


def test_more_stages_than_units_is_refused() -> None:
    with pytest.raises(ConfigError, match="it has 6 units: legal is 1 to 6"):
        auto_layout(flat_list(1, 1), 7)
