"""LLaVA's file: configuration, key names, and that table and built model are the same list."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from transformers import LlavaConfig

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
def original_configs(golden):
    """config.json in the authors' spelling and that of the tower, as one of their releases has them."""
    directory = golden / "vw_lmm/llama/hf"
    return tuple(json.loads((path / "config.json").read_text()) for path in (directory, directory / "vision_tower"))


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


def published_original() -> tuple[dict, dict]:
    """The config.json of llava-v1.5-7b, less what says nothing of the model, and of its tower, a CLIPModel."""
    config = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "freeze_mm_mlp_adapter": False,
        "freeze_mm_vision_resampler": False,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "image_aspect_ratio": "pad",
        "image_grid_pinpoints": None,
        "initializer_range": 0.02,
        "intermediate_size": 11008,
        "max_length": 4096,
        "max_position_embeddings": 4096,
        "mm_hidden_size": 1024,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "model_type": "llava",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "pad_token_id": 0,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "tune_mm_mlp_adapter": False,
        "use_cache": True,
        "use_mm_proj": True,
        "vocab_size": 32000,
    }
    return config, {"model_type": "clip", "text_config": {}, "vision_config": published()["vision_config"]}


def test_reading_and_writing_the_original_spelling_changes_nothing(original_configs):
    for configs in (original_configs, published_original()):
        before = copy.deepcopy(configs)
        assert llava.write(llava.read(*configs), "original") == before == configs
        linear = ({**configs[0], "mm_projector_type": "linear"}, configs[1])
        assert llava.write(llava.read(*linear), "original") == linear
        assert llava.read(*linear).projector.kind == "linear"


def test_the_two_flags_are_written_even_where_they_were_not():
    config, tower = published_original()
    written, _ = llava.write(llava.read({k: v for k, v in config.items() if "mm_use_im" not in k}, tower), "original")
    assert written == config


def test_both_published_spellings_are_the_same_model_and_translate_into_each_other():
    native, flat = llava.read(published()), llava.read(*published_original())
    assert (flat.vision, flat.projector, flat.tokens_per_image) == (native.vision, native.projector, 576)
    assert flat.llm == replace(native.llm, vocab_size=32000)
    assert flat.image_token_id is None
    for options, source, target in ((native, "hf", "original"), (flat, "original", "hf")):
        there = llava.read(*llava.write(options, target))
        back = llava.read(*llava.write(there, source))
        for other in (there, back):
            assert (other.vision, other.projector, other.llm) == (options.vision, options.projector, options.llm)
    assert llava.write(flat, "hf")[0]["text_config"]["eos_token_id"] == 2
    assert LlavaConfig(**llava.write(flat, "hf")[0]).image_token_index == 32000


def test_a_linear_projector_cannot_be_said_natively():
    config, tower = published_original()
    with pytest.raises(
        CheckpointError, match="no projector of kind 'linear'; export in the --dialect of the authors' code"
    ):
        llava.write(llava.read({**config, "mm_projector_type": "linear"}, tower), "hf")


@pytest.mark.parametrize(
    ("change", "tower_change", "message"),
    [
        (dict(mm_use_im_start_end=True), {}, "mm_use_im_start_end True is not supported, only False"),
        (dict(mm_use_im_patch_token=True), {}, "mm_use_im_patch_token"),
        (dict(mm_projector_type="identity"), {}, "only linear, mlpNx_gelu"),
        (dict(mm_vision_select_feature="cls"), {}, "mm_vision_select_feature 'cls'"),
        (dict(mm_vision_select_layer=None), {}, "mm_vision_select_layer must be an integer"),
        (dict(image_aspect_ratio="anyres"), {}, "image_aspect_ratio 'anyres'"),
        (dict(mm_patch_merge_type="spatial_unpad"), {}, "mm_patch_merge_type"),
        (dict(mm_hidden_size=768), {}, "mm_hidden_size is 768 and the --tower's hidden_size is 1024"),
        (dict(model_type="llava_qwen"), {}, "'llava_qwen' is none of llava_llama, llava"),
        ({}, dict(vision_config={"model_type": "siglip_vision_model"}), "'siglip_vision_model'"),
    ],
)
def test_originals_that_llava_cannot_be_are_refused(change, tower_change, message):
    config, tower = published_original()
    with pytest.raises(CheckpointError, match=message):
        llava.read({**config, **change}, {**tower, **tower_change})


def test_an_original_without_its_towers_config_asks_for_it():
    with pytest.raises(CheckpointError, match="(?s)openai/clip-vit-large-patch14-336.*--tower"):
        llava.read(published_original()[0])


def test_a_tower_that_contradicts_the_config_is_refused():
    tower = {**published()["vision_config"], "num_attention_heads": 8}
    with pytest.raises(CheckpointError, match="num_heads 16, the --tower's config.json 8"):
        llava.read(published(), tower)


def test_a_start_is_composed_of_an_llm_and_a_tower():
    llm = {**published()["text_config"], "vocab_size": 32000}
    config = llava.FAMILY.compose(llm, published_original()[1])
    options = llava.read(config)
    assert options.vision == llava.read(published()).vision
    assert (options.llm.vocab_size, options.image_token_id, config["torch_dtype"]) == (32000, None, "float16")
    assert llava.write(options, "hf") == (config, None)
    with pytest.raises(CheckpointError, match="the llm's config.json: model_type 'mistral'"):
        llava.FAMILY.compose({**llm, "model_type": "mistral"}, published_original()[1])


def test_published_sizes():
    options = llava.read(published())
    assert (options.tokens_per_image, options.vision.num_layers, options.vision.stored_layers) == (576, 23, 24)
    assert (options.llm.num_layers, options.llm.num_groups, options.llm.head_dim) == (32, 32, 128)
    parameters = dict.fromkeys(("vision", "projector", "llm"), 0)
    for unit in units(options, num_tokens=1, num_images=1, seq_length=1):
        parameters[unit.part] += unit.parameters
    # Published: the tower less its last block and norm, Vicuna-7B with 64 more rows, padded to 32128.
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
        (dict(text_config={"model_type": "gemma"}), "text_config: megamm does not support Gemma"),
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
    assert whole == {entry.name: entry.shape for entry in table.entries()}
    found = pool.run(describe_parameters, tp, pp, hf_config, ranks=tp * pp)
    assert sum(len(rank) for rank in found) == tp * len(whole), "a parameter is on two stages or on none"
    for rank in found:
        for name, shape in rank.items():
            cut = [dim for dim, (local, full) in enumerate(zip(shape, whole[name], strict=True)) if local != full]
            assert cut == [dim for dim in [table[name].partition_dim] if dim is not None], name
            assert all(shape[dim] * tp == whole[name][dim] for dim in cut), name


def drawn(tp: int, pp: int, hf_config: dict) -> dict[str, torch.Tensor]:
    """Canonical name -> local values as drawn, of every parameter that this rank builds."""
    stages, table = build(tp, pp, hf_config)
    draw(stages, table, seed=3)
    return {name: p.detach() for name, p in canonical_parameters(stages)}


def test_a_draw_does_not_depend_on_the_layout(hf_config, pool):
    table = llava.FAMILY.keys["hf"](llava.read(hf_config))
    one = pool.run(drawn, 1, 1, hf_config, ranks=1)[0]
    four = pool.run(drawn, 2, 2, hf_config, ranks=4)
    for name, tensor in one.items():
        assert torch.equal(table[name].join([rank[name] for rank in four if name in rank]), tensor), name
