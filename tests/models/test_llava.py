"""LLaVA's file: configuration, key names, and that table and built model are the same list."""

import copy
import json
from dataclasses import replace

import pytest
import torch

from megamm import backend
from megamm.config.schema import Parallel
from megamm.errors import CheckpointError
from megamm.models import llava
from megamm.models.build import build_stages, units
from megamm.models.parameters import canonical_parameters, draw
from megamm.models.spec import Build
from megamm.parallel import groups
from megamm.parallel.placement import auto_layout


@pytest.fixture
def hf_config(golden):
    return json.loads((golden / "llava/hf_native/hf/config.json").read_text())


def published() -> dict:
    """The config.json of llava-1.5-7b-hf, which leaves most of the llm's sizes to transformers' defaults."""
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_token_index": 32000,
        "model_type": "llava",
        "pad_token_id": 32001,
        "projector_hidden_act": "gelu",
        "text_config": {
            "architectures": ["LlamaForCausalLM"],
            "max_position_embeddings": 4096,
            "model_type": "llama",
            "rms_norm_eps": 1e-05,
            "torch_dtype": "float16",
            "vocab_size": 32064,
        },
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "vision_config": {
            "hidden_size": 1024,
            "image_size": 336,
            "intermediate_size": 4096,
            "model_type": "clip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
            "projection_dim": 768,
            "vocab_size": 32000,
        },
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vocab_size": 32064,
    }


def test_reading_and_writing_a_config_changes_nothing(hf_config):
    for config in (hf_config, published()):
        before = copy.deepcopy(config)
        assert llava.write(llava.read(config), "hf") == (before, None) == (config, None)


def test_published_sizes():
    options = llava.read(published())
    assert (options.tokens_per_image, options.vision.num_layers, options.vision.stored_layers) == (576, 23, 24)
    assert (options.llm.num_layers, options.llm.num_groups, options.llm.head_dim) == (32, 32, 128)
    parameters = dict.fromkeys(("vision", "projector", "llm"), 0)
    for unit in units(options, num_tokens=1, num_images=1, seq_length=1):
        parameters[unit.part] += unit.parameters
    # llava_family.md 1.2 to 1.4: the tower less its last block and norm, Vicuna-7B with 64 more rows, padded to 32128.
    assert parameters["vision"] == 303_507_456 - 12_596_224 - 2 * 1024
    assert parameters["projector"] == 20_979_712
    assert parameters["llm"] == 6_738_415_616 + 2 * 128 * 4096


@pytest.mark.parametrize("dialect", ["hf", "original"])
def test_fresh_options_write_a_config_that_reads_back(dialect):
    options = llava.read(published())
    again = llava.read(*llava.write(replace(options, hf={}), dialect))
    assert (again.llm, again.vision, again.projector) == (options.llm, options.vision, options.projector)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(projector_hidden_act="relu"), "projector_hidden_act 'relu'"),
        (dict(vision_feature_layer=[-2, -1]), "vision_feature_layer one integer"),
        (dict(vision_feature_layer=-40), "feature layer -40"),
        (dict(text_config={"model_type": "gemma"}), "text_config: model_type 'gemma'"),
        (dict(text_config={"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2}}), "'linear'"),
        (dict(model_type="llava_next"), "not a llava"),
    ],
)
def test_models_that_llava_cannot_be_are_refused(change, message):
    with pytest.raises(CheckpointError, match=message):
        llava.read({**published(), **change})


def build(tp: int, pp: int, hf_config: dict):
    """The stages of this rank, and the table."""
    backend.start("cpu")
    options = llava.read(hf_config)
    table = llava.FAMILY.keys["hf"](options)
    layout = auto_layout(units(options, num_tokens=8, num_images=1, seq_length=8), pp)
    groups.start_distributed()
    groups.start(Parallel(tp=tp, pp=pp), layout)
    return build_stages(options, Build(tp=tp, layout=layout), table), table


def describe_parameters(tp: int, pp: int, hf_config: dict) -> dict[str, tuple[int, ...]]:
    """Canonical name -> local shape of every parameter that this rank builds."""
    return {name: tuple(p.shape) for name, p in canonical_parameters(build(tp, pp, hf_config)[0])}


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (2, 2)])
def test_table_and_model_are_the_same_list(tp, pp, hf_config, pool):
    table = llava.FAMILY.keys["hf"](llava.read(hf_config))
    whole = pool.run(describe_parameters, 1, 1, hf_config, ranks=1)[0]
    assert sorted(whole) == sorted(entry.name for entry in table.entries())
    found = pool.run(describe_parameters, tp, pp, hf_config, ranks=tp * pp)
    assert sum(len(rank) for rank in found) == tp * len(whole), "a parameter is on two stages or on none"
    for rank in found:
        for name, shape in rank.items():
            cut = [dim for dim, (local, full) in enumerate(zip(shape, whole[name], strict=True)) if local != full]
            assert cut == [dim for dim in [table[name].partition_dim] if dim is not None], name
            assert all(shape[dim] * tp == whole[name][dim] for dim in cut), name


def draw_and_sum(tp: int, pp: int, hf_config: dict) -> dict[str, float]:
    """Sums of the absolute values of the drawn local slices."""
    stages, table = build(tp, pp, hf_config)
    draw(stages, table, seed=3)
    return {name: p.double().abs().sum().item() for name, p in canonical_parameters(stages)}


def test_a_draw_depends_on_the_seed_and_not_on_the_layout(hf_config, pool):
    table = llava.FAMILY.keys["hf"](llava.read(hf_config))
    one = pool.run(draw_and_sum, 1, 1, hf_config, ranks=1)[0]
    four = pool.run(draw_and_sum, 2, 2, hf_config, ranks=4)
    for name, total in one.items():
        parts = [rank[name] for rank in four if name in rank]
        joined = sum(parts) if table[name].partition_dim is not None else parts[0]
        assert joined == pytest.approx(total, rel=1e-12), name
    weight = "llm.decoder.layers.0.mlp.linear_fc2.weight"
    assert one[weight] / (96 * 64) == pytest.approx(0.02 * (2 / torch.pi) ** 0.5, rel=0.05)
