"""The lower rungs of the ladder for every reference variant: configuration, key names, sizes, bit-exact round trip."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from megamm import backend
from megamm.config.schema import Parallel
from megamm.data.loader import collate
from megamm.errors import CheckpointError
from megamm.models.build import build_stages, units
from megamm.models.parameters import canonical_parameters, fill
from megamm.models.spec import Build
from megamm.parallel import groups
from megamm.parallel.placement import auto_layout
from megamm.registry import FAMILIES
from megamm.verify import load_case
from megamm.weights.convert import export_hf, import_hf, open_hf
from megamm.weights.hf import read_config
from tests.families import VARIANTS, Variant

EVERY = pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.path)


def families(variant: Variant):
    """Those that an import is to choose from: all, without --family."""
    return [FAMILIES[variant.named]] if variant.named else list(FAMILIES.values())


def opened(variant: Variant):
    """As an import opens it."""
    return open_hf(variant.hf, variant.tower, families(variant))


@EVERY
def test_family_and_dialect_are_found_and_the_config_is_written_as_it_was_read(variant):
    checkpoint = opened(variant)
    assert (checkpoint.info.family, checkpoint.info.dialect) == (variant.family, variant.dialect)
    config = json.loads((variant.hf / "config.json").read_text())
    written, tower = checkpoint.family.write(checkpoint.options, variant.dialect)
    assert written == config and config.items() <= checkpoint.info.hf_config.items()
    is_inside = variant.tower is None or "vision_tower_config" in config
    assert tower == (None if is_inside else read_config(variant.tower))


@EVERY
def test_every_tensor_comes_back_bit_for_bit(variant, tmp_path):
    import_hf(variant.hf, variant.tower, families(variant), tmp_path / "checkpoint")
    assert export_hf(tmp_path / "checkpoint", FAMILIES[variant.family], tmp_path / "back") == variant.dialect
    expected, found = load_file(variant.hf / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert read_config(tmp_path / "back") == read_config(variant.hf)


@EVERY
def test_units_count_the_parameters_of_the_table(variant):
    checkpoint = opened(variant)
    counted: dict[str, int] = {}
    for entry in checkpoint.table.entries():
        words = entry.name.split(".")
        unit = f"{words[0]}.layer.{words[3]}" if "layers" in words and words[0] != "projector" else words[0]
        unit = f"vision.layer.{checkpoint.options.vision.num_layers - 1}" if words[1] == "post_norm" else unit
        unit = "llm.embed" if words[1] == "embedding" else unit
        unit = "llm.head" if words[1] == "output_layer" or words[2:3] == ["final_layernorm"] else unit
        unit = "vision.embed" if unit == "vision" else unit
        counted[unit] = counted.get(unit, 0) + entry.num_elements
    flat = units(checkpoint.options, num_tokens=8, num_images=1, seq_length=8)
    for guest in {guest for unit in flat for guest in unit.guests}:  # a part counts once, where it lives first
        counted[next(unit.name for unit in flat if guest in unit.guests)] += counted.pop(guest, 0)
    assert {unit.name: unit.parameters for unit in flat} == counted


def causal_flops(query, key, value, dropout=0.0, is_causal=False, **_) -> int:
    """Of attention: two matrix products, half of them under a causal mask."""
    return 4 * query.numel() * key.size(-2) // (1 + is_causal)


causal_flops._get_raw = True  # FlopCounterMode then gives it tensors and not shapes


def count_flops(variant: Variant) -> tuple[dict[str, int], dict[str, float]]:
    """FLOPs of a forward pass by part, the llm with its visual words: as torch counts them, and of the units."""
    backend.start("cpu")
    checkpoint = opened(variant)
    options = checkpoint.options
    case = load_case(variant.hf.parent / "cases/two_images.npz", options)
    batch = collate(
        case.samples[:1],
        pad_id=0,
        pad_multiple=1,
        tokens_per_image=options.tokens_per_image,
        with_pixels=True,
        image_size=options.vision.image_size,
    )
    size, length = batch.ids_BS.shape
    flat = units(options, num_tokens=size * length, num_images=batch.num_images, seq_length=length)
    layout = auto_layout(flat, 1)
    groups.start_distributed()
    groups.start(Parallel(), layout)
    [stage] = build_stages(options, Build(layout=layout), checkpoint.table)
    fill([stage], checkpoint.table, lambda entry: checkpoint.load(entry.name))
    stage.requires_grad_(False).set_input_tensor([None])
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={attention: causal_flops}) as counter:
        stage(batch)
    found = {part: sum(counter.get_flop_counts()[f"VLM.{part}"].values()) for part in ("vision", "projector")}
    found["llm"] = counter.get_total_flops() - sum(found.values())
    return found, {part: sum(unit.flops for unit in flat if unit.part == part) for part in found}


@EVERY
def test_units_count_the_flops_of_a_forward_pass(variant, pool):
    """Hyper layers are estimated: their gate is left out, and a joint softmax is no causal one."""
    [(found, estimated)] = pool.run(count_flops, variant, ranks=1)
    assert estimated == pytest.approx(found, rel=0.02 if variant.family == "mplug_owl3" else 1e-12)


def describe_parameters(variant: Variant, tp: int, pp: int) -> dict[str, tuple[int, ...]]:
    """Canonical name -> local shape of every parameter that this rank builds."""
    backend.start("cpu")
    checkpoint = opened(variant)
    layout = auto_layout(units(checkpoint.options, num_tokens=8, num_images=1, seq_length=8), pp)
    groups.start_distributed()
    groups.start(Parallel(tp=tp, pp=pp), layout)
    stages = build_stages(checkpoint.options, Build(tp=tp, layout=layout), checkpoint.table)
    return {name: tuple(p.shape) for name, p in canonical_parameters(stages)}


@pytest.mark.parametrize(("tp", "pp"), [(2, 2)])
@EVERY
def test_table_and_model_are_the_same_list(variant, tp, pp, pool):
    table = opened(variant).table
    whole = {entry.name: entry.shape for entry in table.entries()}
    found = pool.run(describe_parameters, variant, tp, pp, ranks=tp * pp)
    assert {name for rank in found for name in rank} == whole.keys()
    for rank in found:
        for name, shape in rank.items():
            cut = [dim for dim, (local, full) in enumerate(zip(shape, whole[name], strict=True)) if local != full]
            assert cut == [dim for dim in [table[name].partition_dim] if dim is not None], name
            assert all(shape[dim] * tp == whole[name][dim] for dim in cut), name


def test_transformers_spelling_is_llavas_own(golden):
    """Other families write it, too; a model that all could be is the one's whose spelling it is."""
    config = json.loads((golden / "llava/hf_native/hf/config.json").read_text())
    able = [name for name, family in FAMILIES.items() if name != "llava" and reads(family, config)]
    assert able, "the model is no other family's, so the test says nothing"
    assert open_hf(golden / "llava/hf_native/hf", None, list(FAMILIES.values())).info.family == "llava"


def test_a_model_that_is_nobodys_own_asks_for_a_family(golden):
    twins = [replace(FAMILIES["llava"], name=name, export_dialect="original") for name in ("one", "two")]
    with pytest.raises(CheckpointError, match="fits more than one family: one, two. Say which with --family"):
        open_hf(golden / "llava/hf_native/hf", None, twins)


def reads(family, config):
    """Whether a family can be what this config.json says."""
    try:
        return family.read(config, None) is not None
    except CheckpointError:
        return False
