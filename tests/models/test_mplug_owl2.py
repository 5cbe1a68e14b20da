"""mPLUG-Owl2's file and modules: configuration, key names, starts, and its authors' results at every layout."""

import copy
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from megamm import backend
from megamm.config.schema import Parallel
from megamm.errors import CheckpointError, ConfigError
from megamm.models import mplug_owl2
from megamm.models.build import build_stages, units
from megamm.models.parameters import canonical_parameters, draw
from megamm.models.spec import Build
from megamm.parallel import groups
from megamm.parallel.placement import auto_layout
from megamm.registry import FAMILIES
from megamm.verify import Request, verify
from megamm.weights.convert import export_hf, import_hf, open_hf, open_start, with_image_size, write_checkpoint
from megamm.weights.hf import read_config
from tests.cases import check_cases, layout_name

VARIANT = "mplug_owl2/llama"
CASES = ("one_image", "two_images", "mixed_batch", "text_only", "video_slot")
LAYOUTS = [
    dict(tp=2),
    dict(tp=2, sequence_parallel=True, recompute="full"),
    dict(pp=2, layout="Vv|vPEtttL", recompute="full"),
    dict(tp=2, pp=2, layout="V|v|vPEt|ttL", sequence_parallel=True),
    dict(dp=2),
]
"""Beside those that every family's variants climb."""


@pytest.fixture
def hf_config(golden):
    return json.loads((golden / VARIANT / "hf/config.json").read_text())


def published() -> dict:
    """The config.json of the 7B release, less what says nothing of the model."""
    return {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
        "model_type": "mplug_owl2",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "visual_config": {
            "visual_abstractor": {
                "add_v2t_pos_emb": False,
                "attention_probs_dropout_prob": 0.0,
                "encoder_hidden_size": 1024,
                "grid_size": 32,
                "hidden_size": 1024,
                "intermediate_size": 2816,
                "layer_norm_eps": 1e-06,
                "max_length": 20,
                "model_type": "mplug_owl_visual_abstract",
                "num_attention_heads": 16,
                "num_hidden_layers": 6,
                "num_learnable_queries": 64,
                "use_cls_token": True,
            },
            "visual_model": {
                "attention_dropout": 0.0,
                "hidden_act": "quick_gelu",
                "hidden_size": 1024,
                "image_size": 448,
                "intermediate_size": 4096,
                "layer_norm_eps": 1e-06,
                "max_length": 20,
                "model_type": "mplug_owl_vision_model",
                "num_attention_heads": 16,
                "num_channels": 3,
                "num_hidden_layers": 24,
                "patch_size": 14,
                "projection_dim": 768,
                "use_cls_token": True,
                "use_flash_attn": False,
                "use_post_layernorm": True,
            },
        },
        "vocab_size": 32000,
        "tune_visual_abstractor": True,
    }


def test_reading_and_writing_a_config_changes_nothing(hf_config):
    for config in (hf_config, published()):
        before = copy.deepcopy(config)
        assert mplug_owl2.write(mplug_owl2.read(config), "original") == (before, None) == (config, None)


def test_fresh_options_write_a_config_that_reads_back():
    options = mplug_owl2.read(published())
    again = mplug_owl2.read(mplug_owl2.write(replace(options, hf={}), "original")[0])
    assert (again.llm, again.vision, again.projector) == (options.llm, options.vision, options.projector)


def test_published_sizes():
    options = mplug_owl2.read(published())
    assert (options.tokens_per_image, options.vision.num_features, options.llm.num_ways) == (65, 1025, 2)
    parameters = dict.fromkeys(("vision", "projector", "llm"), 0)
    for unit in units(options, num_tokens=1, num_images=1, seq_length=1):
        parameters[unit.part] += unit.parameters
    # Counted in the authors' model.
    assert parameters == {"vision": 303_966_208, "projector": 81_473_536, "llm": 7_812_419_584}
    table = mplug_owl2.keys(options)
    assert sum(entry.num_elements for entry in table.entries()) == 8_197_859_328


@pytest.mark.parametrize(
    ("where", "change", "message"),
    [
        (None, dict(model_type="mplug_owl2_1"), "Owl2.1, the Qwen flavour, is not supported"),
        (None, dict(model_type="llava"), "model_type 'llava' is not 'mplug_owl2'"),
        (None, dict(visual_config={}), "visual_config lacks visual_model"),
        (None, dict(num_key_value_heads=8), "as many key/value heads as heads"),
        ("visual_model", dict(use_cls_token=False), "mplug_owl_vision_model with use_cls_token False is not supported"),
        ("visual_model", dict(use_post_layernorm=False), "use_post_layernorm"),
        ("visual_model", dict(image_size=224), "grid_size is 32, and with this visual_model it must be 16"),
        ("visual_abstractor", dict(hidden_size=768), "hidden_size is 768"),
        ("visual_abstractor", dict(add_v2t_pos_emb=True), "add_v2t_pos_emb is True"),
    ],
)
def test_models_that_owl2_cannot_be_are_refused(where, change, message):
    config = published()
    (config if where is None else config["visual_config"][where]).update(change)
    with pytest.raises(CheckpointError, match=message):
        mplug_owl2.read(config)


def build(tp: int, pp: int, hf_config: dict):
    """The stages of this rank, and the table."""
    backend.start("cpu")
    options = mplug_owl2.read(hf_config)
    table = mplug_owl2.keys(options)
    layout = auto_layout(units(options, num_tokens=8, num_images=1, seq_length=8), pp)
    groups.start_distributed()
    groups.start(Parallel(tp=tp, pp=pp), layout)
    return build_stages(options, Build(tp=tp, layout=layout), table), table


def drawn(tp: int, pp: int, hf_config: dict) -> dict[str, torch.Tensor]:
    """Canonical name -> local values as drawn, of every parameter that this rank builds."""
    stages, table = build(tp, pp, hf_config)
    draw(stages, table, seed=3)
    return {name: p.detach() for name, p in canonical_parameters(stages)}


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (2, 2)])
def test_table_and_model_are_the_same_list_and_drawn_alike(tp, pp, hf_config, pool):
    options = mplug_owl2.read(hf_config)
    table = mplug_owl2.keys(options)
    whole = pool.run(drawn, 1, 1, hf_config, ranks=1)[0]
    assert {name: tuple(tensor.shape) for name, tensor in whole.items()} == {e.name: e.shape for e in table.entries()}
    counted = units(options, num_tokens=1, num_images=1, seq_length=1)
    assert sum(unit.parameters for unit in counted) == sum(entry.num_elements for entry in table.entries())
    found = pool.run(drawn, tp, pp, hf_config, ranks=tp * pp)
    assert sum(len(rank) for rank in found) == tp * len(whole), "a parameter is on two stages or on none"
    for name, tensor in whole.items():
        assert torch.equal(table[name].join([rank[name] for rank in found if name in rank]), tensor), name
    assert (whole["llm.decoder.layers.0.input_layernorm.1.weight"] == 1).all()
    queries = whole["projector.query_tokens"].abs().mean().item()
    assert queries == pytest.approx((2 / torch.pi) ** 0.5, rel=0.1), "queries are drawn with a deviation of 1"


@pytest.mark.parametrize("has_buffers", [False, True], ids=["as released", "as a state_dict"])
def test_import_and_export_give_back_every_bit(has_buffers, golden, tmp_path):
    tensors = load_file(golden / VARIANT / "hf/model.safetensors")
    if has_buffers:
        generator = torch.Generator().manual_seed(1)
        for i in range(2):
            prefix = f"model.visual_abstractor.encoder.layers.{i}.crossattention.attention."
            for x, rows in (("q", 8), ("k", 17)):
                tensors[f"{prefix}{x}_pos_embed"] = torch.randn(rows, 64, generator=generator)
    (tmp_path / "hf").mkdir()
    save_file(tensors, tmp_path / "hf/model.safetensors")
    (tmp_path / "hf/config.json").write_text((golden / VARIANT / "hf/config.json").read_text())
    info = import_hf(tmp_path / "hf", None, list(FAMILIES.values()), tmp_path / "checkpoint")
    assert (info.family, info.dialect) == ("mplug_owl2", "original")
    export_hf(tmp_path / "checkpoint", mplug_owl2.FAMILY, tmp_path / "back")
    back = load_file(tmp_path / "back/model.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) and back[name].dtype == tensor.dtype for name, tensor in tensors.items())
    assert read_config(tmp_path / "back") == read_config(tmp_path / "hf")


def test_slices_join_to_the_whole(golden):
    checkpoint = open_hf(golden / VARIANT / "hf", None, [mplug_owl2.FAMILY])
    for entry in checkpoint.table.entries():
        whole = checkpoint.load(entry.name)
        for tp in (1, 2, 4):
            assert torch.equal(entry.join([entry.slice(whole, rank, tp) for rank in range(tp)]), whole), entry.name


def test_a_way_that_is_missing_is_not_invented(golden, tmp_path):
    tensors = load_file(golden / VARIANT / "hf/model.safetensors")
    del tensors["model.layers.1.input_layernorm.multiway.1.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((golden / VARIANT / "hf/config.json").read_text())
    with pytest.raises(CheckpointError, match="missing: model.layers.1.input_layernorm.multiway.1.weight"):
        open_hf(tmp_path, None, [mplug_owl2.FAMILY])


@pytest.fixture
def plain_parts(golden, tmp_path):
    """A plain Llama and a plain CLIP tower with the golden model's text way and its tower's weights."""
    whole, config = load_file(golden / VARIANT / "hf/model.safetensors"), read_config(golden / VARIANT / "hf")
    llm = {name.replace(".multiway.0", ""): tensor for name, tensor in whole.items() if "visi" not in name and
           "visual" not in name and "multiway.1" not in name}  # fmt: skip
    tower = {}
    for name, tensor in whole.items():
        if not name.startswith("model.vision_model."):
            continue
        name = name.removeprefix("model.")
        if "query_key_value" in name:
            per_head = tensor.view(4, 3, 16, *tensor.shape[1:])
            parts = {x: per_head[:, k].flatten(0, 1).contiguous() for k, x in enumerate("qkv")}
            tower |= {name.replace("query_key_value", f"{x}_proj"): part for x, part in parts.items()}
            continue
        for theirs, clips in (
            ("cls_token", "class_embedding"),
            ("patch_embed.", "patch_embedding."),
            ("position_embedding", "position_embedding.weight"),
            ("embeddings.pre_layernorm", "pre_layrnorm"),
            ("self_attn.dense", "self_attn.out_proj"),
            (".input_layernorm", ".layer_norm1"),
            (".post_attention_layernorm", ".layer_norm2"),
        ):
            name = name.replace(theirs, clips)
        shape = tensor.shape[2:] if "class" in name else tensor.shape[1:] if "position" in name else tensor.shape
        tower[name] = tensor.reshape(shape)
    text = {key: value for key, value in config.items() if key != "visual_config"} | {"model_type": "llama"}
    vision = config["visual_config"]["visual_model"] | {"model_type": "clip_vision_model", "layer_norm_eps": 1e-5}
    for part, tensors, its in (("llm", llm, text), ("tower", tower, vision)):
        (tmp_path / part).mkdir()
        save_file(tensors, tmp_path / part / "model.safetensors")
        (tmp_path / part / "config.json").write_text(json.dumps(its))
    return tmp_path / "llm", tmp_path / "tower", whole


def test_a_start_copies_the_text_way_to_the_visual_way(plain_parts, hf_config, tmp_path):
    llm, tower, whole = plain_parts
    start = open_start(llm, tower, mplug_owl2.FAMILY, seed=5)
    assert start.options.vision == mplug_owl2.read(hf_config).vision
    assert {how: len(names) for (part, how, _), names in start.origins().items() if part == "llm"} == {
        "copied": 3 + 3 * 7,
        "duplicated": 3 * 3,
    }
    assert {part for part, how, _ in start.origins() if how == "drawn"} == {"projector"}
    write_checkpoint(start, tmp_path / "start", llm)
    export_hf(tmp_path / "start", mplug_owl2.FAMILY, tmp_path / "hf")
    found = load_file(tmp_path / "hf/model.safetensors")
    for name in whole:
        if "visual_abstractor" not in name:
            assert torch.equal(found[name], whole[name.replace("multiway.1", "multiway.0")]), name
    again = open_hf(tmp_path / "hf", None, list(FAMILIES.values()))
    assert (again.info.family, again.options.projector.ffn_size) == ("mplug_owl2", 176)


def test_a_model_for_pictures_of_another_size(golden, tmp_path):
    checkpoint = open_hf(golden / VARIANT / "hf", None, [mplug_owl2.FAMILY])
    larger = with_image_size(checkpoint, 84)
    assert (larger.options.vision.num_positions, larger.options.projector) == (37, checkpoint.options.projector)
    write_checkpoint(larger, tmp_path / "larger", golden / VARIANT / "hf")
    export_hf(tmp_path / "larger", mplug_owl2.FAMILY, tmp_path / "hf")
    visual = read_config(tmp_path / "hf")["visual_config"]
    assert (visual["visual_model"]["image_size"], visual["visual_abstractor"]["grid_size"]) == (84, 6)
    before, after = load_file(golden / VARIANT / "hf/model.safetensors"), load_file(tmp_path / "hf/model.safetensors")
    key = "model.vision_model.embeddings.position_embedding"
    old, new = before.pop(key)[0], after.pop(key)[0]
    assert torch.equal(new[0], old[0])
    # As the authors' get_abs_pos does it.
    square = old[1:].reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
    expected = F.interpolate(square, size=(6, 6), mode="bicubic", align_corners=False)
    assert torch.equal(new[1:], expected.permute(0, 2, 3, 1).flatten(0, 2))
    assert all(torch.equal(after[name], before[name]) for name in after)
    assert before.keys() - after.keys() == {name for name in before if "inv_freq" in name}
    for size, message in ((60, "60 is no multiple of 14"), (0, "0 is no multiple")):
        with pytest.raises(CheckpointError, match=message):
            with_image_size(checkpoint, size)
    native = open_hf(golden / "llava/hf_native/hf", None, [FAMILIES["llava"]])
    with pytest.raises(CheckpointError, match="the pictures of family llava have the size"):
        with_image_size(native, 84)


def test_a_start_for_larger_pictures(plain_parts):
    llm, tower, whole = plain_parts
    start = with_image_size(open_start(llm, tower, mplug_owl2.FAMILY, seed=5), 112)
    assert start.load("vision.position_embedding").shape == start.metas()["vision.position_embedding"].shape == (65, 64)
    assert start.info.tower_config is None and start.options.vision.image_size == 112
    found = start.load("llm.decoder.layers.0.input_layernorm.1.weight")
    assert torch.equal(found, whole["model.layers.0.input_layernorm.multiway.0.weight"])


def test_a_tower_for_another_size_of_pictures_is_refused(plain_parts, hf_config):
    with pytest.raises(CheckpointError, match="pictures of 224 pixels, the model of config.json for 56"):
        mplug_owl2.read(hf_config, {"image_size": 224})


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_name)
def test_every_case_equals_the_authors_code(layout, golden, pool):
    directory = golden / VARIANT
    request = Request(hf=str(directory / "hf"), **layout)
    reports = check_cases(request, [directory / f"cases/{x}.npz" for x in CASES], pool, {"modality_indicators"})
    assert {case for case in reports if "visual_tokens" not in reports[case].differences} == {"text_only"}


@pytest.mark.parametrize("layout", [dict(), dict(tp=2, pp=2, sequence_parallel=True)], ids=layout_name)
def test_a_text_only_batch_leaves_exact_zeros_on_the_visual_way(layout, golden, pool):
    request = Request(hf=str(golden / VARIANT / "hf"), **layout)
    [(_, found)] = verify(request, [golden / VARIANT / "cases/text_only.npz"], pool)
    grads = {key.removeprefix("grad:"): grad for key, grad in found.items() if key.startswith("grad:")}
    unused = {key for key in grads if key.startswith(("model.visi", "model.visual")) or "multiway.1" in key}
    assert len({key for key in unused if "multiway" in key}) == 3 * 4
    assert all(not grads[key].any() for key in unused)
    assert all(grads[key].any() for key in grads.keys() - unused)


def test_heads_of_tower_and_abstractor_bound_tensor_parallelism(golden):
    with pytest.raises(ConfigError, match="vision has 4 attention heads.*projector has 4 attention heads"):
        list(verify(Request(hf=str(golden / VARIANT / "hf"), tp=8), [golden / VARIANT / "cases/one_image.npz"]))
