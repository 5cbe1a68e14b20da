"""TinyLLaVA's file: both generations, published sizes, every combination of parts, starts, native export."""

import copy
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from megamm.batch import IMAGE
from megamm.errors import CheckpointError
from megamm.models import llava_line, tinyllava
from megamm.models.build import units
from megamm.models.llm import qwen2
from megamm.models.parts import Parts
from megamm.models.vision import clip
from megamm.weights.convert import export_hf, import_hf, open_hf, open_start, write_checkpoint
from megamm.weights.hf import read_config
from tests.families import GOLDEN

FAMILY = tinyllava.FAMILY
FOLDER = GOLDEN / "tinyllava"
TOWER = dict(
    architectures=["SigLipVisionModel"], hidden_act="gelu_pytorch_tanh", hidden_size=1152, image_size=384,
    intermediate_size=4304, layer_norm_eps=1e-6, model_type="siglip_vision_model", num_attention_heads=16,
    num_hidden_layers=27, patch_size=14,
)  # fmt: skip
SHARED = dict(
    freeze_mm_mlp_adapter=False, image_aspect_ratio="pad", mm_hidden_size=1152, mm_patch_merge_type="flat",
    mm_projector_lr=None, mm_projector_type="mlp2x_gelu", mm_use_im_patch_token=False, mm_use_im_start_end=False,
    mm_vision_select_feature="patch", mm_vision_select_layer=-2, tokenizer_model_max_length=3072,
    tokenizer_padding_side="right", torch_dtype="float16", tune_entire_model=True, tune_mm_mlp_adapter=False,
    use_mm_proj=True,
)  # fmt: skip
PHI = SHARED | dict(
    architectures=["TinyLlavaPhiForCausalLM"], bos_token_id=50256, eos_token_id=50256, hidden_act="gelu_new",
    hidden_size=2560, intermediate_size=10240, layer_norm_eps=1e-5, max_position_embeddings=2048,
    mm_vision_tower="bczhou/TinyLLaVA-3.1B-SigLIP", model_type="tiny_llava_phi", num_attention_heads=32,
    num_hidden_layers=32, num_key_value_heads=32, pad_token_id=50256, partial_rotary_factor=0.4, qk_layernorm=False,
    resid_pdrop=0.1, rope_scaling=None, rope_theta=10000.0, tie_word_embeddings=False, vocab_size=51200,
)  # fmt: skip
STABLELM = SHARED | dict(
    architectures=["TinyLlavaStablelmForCausalLM"], bos_token_id=100257, eos_token_id=100257, hidden_act="silu",
    hidden_size=2048, intermediate_size=5632, max_position_embeddings=4096,
    mm_vision_tower="bczhou/TinyLLaVA-2.0B-SigLIP", model_type="tiny_llava_stablelm", norm_eps=1e-5,
    num_attention_heads=32, num_hidden_layers=24, num_heads=32, num_key_value_heads=32, rope_pct=0.25,
    rope_theta=10000, rotary_scaling_factor=1.0, tie_word_embeddings=False, use_qkv_bias=True, vocab_size=100352,
)  # fmt: skip
LLAMA = SHARED | dict(
    architectures=["TinyLlavaLlamaForCausalLM"], attention_bias=False, hidden_act="silu", hidden_size=2048,
    intermediate_size=5632, max_position_embeddings=2048, mm_vision_tower="bczhou/TinyLLaVA-1.5B-SigLIP",
    model_type="tiny_llava", num_attention_heads=32, num_hidden_layers=22, num_key_value_heads=4, pretraining_tp=1,
    rms_norm_eps=1e-5, rope_scaling=None, rope_theta=10000.0, tie_word_embeddings=False, vocab_size=32000,
)  # fmt: skip
FACTORY = dict(
    architectures=["TinyLlavaForConditionalGeneration"], connector_type="mlp2x_gelu", hidden_size=2560,
    ignore_index=-100, image_aspect_ratio="square", image_token_index=-200, llm_model_name_or_path="microsoft/phi-2",
    model_type="tinyllava", num_queries=128, num_resampler_layers=3, pad_token="<|endoftext|>", pad_token_id=50256,
    resampler_hidden_size=768,
    text_config=dict(
        architectures=["PhiForCausalLM"], bos_token_id=50256, embd_pdrop=0.0, eos_token_id=50256, hidden_size=2560,
        hidden_act="gelu_new", intermediate_size=10240, layer_norm_eps=1e-5, model_type="phi",
        num_hidden_layers=32, partial_rotary_factor=0.4, resid_pdrop=0.1, torch_dtype="float16", vocab_size=51200,
    ),
    tokenizer_model_max_length=3072, tokenizer_name_or_path="microsoft/phi-2", tokenizer_padding_side="right",
    tokenizer_use_fast=False, torch_dtype="float16", tune_type_connector="full", tune_type_llm="full",
    tune_type_vision_tower="frozen", tune_vision_tower_from_layer=0, use_cache=True,
    vision_config=dict(
        hidden_act="gelu_pytorch_tanh", hidden_size=1152, image_size=384, intermediate_size=4304, layer_norm_eps=1e-6,
        model_name_or_path="google/siglip-so400m-patch14-384", model_name_or_path2="",
        model_type="siglip_vision_model", num_attention_heads=16, num_hidden_layers=27, patch_size=14,
    ),
    vision_feature_layer=-2, vision_feature_select_strategy="patch", vision_hidden_size=1152,
    vision_model_name_or_path="google/siglip-so400m-patch14-384", vision_model_name_or_path2="", vocab_size=51200,
)  # fmt: skip
BENCH = {"phi": PHI, "stablelm": STABLELM, "llama": LLAMA}


@pytest.mark.parametrize("name", BENCH)
def test_reading_and_writing_a_published_config_changes_nothing(name):
    config = BENCH[name]
    before = copy.deepcopy((config, TOWER))
    assert FAMILY.write(FAMILY.read(config, TOWER), "original") == before == (config, TOWER)


def test_reading_and_writing_the_factorys_published_config_changes_nothing():
    before = copy.deepcopy(FACTORY)
    assert FAMILY.write(FAMILY.read(FACTORY, None), "factory") == (before, None) == (FACTORY, None)


def parameters(options) -> int:
    return sum(unit.parameters for unit in units(options, num_tokens=1, num_images=1, seq_length=1))


@pytest.mark.parametrize(
    ("name", "published"), [("phi", 3_186_888_224), ("stablelm", 2_048_820_768), ("llama", 1_504_353_824)]
)
def test_published_sizes(name, published):
    """The published counts count the tower's unused last norm, too."""
    options = FAMILY.read(BENCH[name], TOWER)
    assert parameters(options) == published - 2 * 1152
    assert (options.tokens_per_image, options.vision.num_layers, options.max_tokens) == (729, 26, 3072)
    assert (options.image.resize, options.image.mean, options.image.std) == ("squash", (0.5,) * 3, (0.5,) * 3)


def test_the_factory_has_a_bias_on_the_head_and_drops_a_patch():
    bench, factory = FAMILY.read(PHI, TOWER), FAMILY.read(FACTORY, None)
    assert factory.llm == replace(bench.llm, has_head_bias=True)
    assert factory.vision == replace(bench.vision, keep_first_token=False)
    assert (bench.tokens_per_image, factory.tokens_per_image) == (729, 728)
    assert parameters(factory) == parameters(bench) + 51200
    with pytest.raises(CheckpointError, match="no class for this llm .phi.*has_head_bias False.*another --dialect"):
        FAMILY.write(factory, "original")
    with pytest.raises(CheckpointError, match="all 729 features of this tower, and this model takes 728"):
        FAMILY.write(replace(bench, vision=factory.vision), "original")
    with pytest.raises(CheckpointError, match="transformers' llava has no bias on the head"):
        FAMILY.write(factory, "hf")


@pytest.mark.parametrize("name", BENCH)
def test_the_generations_translate_into_each_other(name):
    bench = FAMILY.read(BENCH[name], TOWER)
    if name == "phi":
        with pytest.raises(CheckpointError, match="Factory's phi has has_head_bias True, this model False"):
            FAMILY.write(bench, "factory")
        return
    config, _ = FAMILY.write(bench, "factory")
    factory = FAMILY.read(config, None)
    again = FAMILY.read(*FAMILY.write(factory, "original"))
    native = FAMILY.read(*FAMILY.write(bench, "hf"))
    for other in (factory, again, native):
        assert (other.llm, other.vision, other.projector) == (bench.llm, bench.vision, bench.projector)
    assert factory.max_tokens == again.max_tokens == 3072
    assert config["image_aspect_ratio"] == again.hf["image_aspect_ratio"] == "pad"


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        (PHI, dict(mm_projector_type="qformer"), "'qformer' is not supported, only linear, mlpNx_gelu, resampler"),
        (PHI, dict(model_type="tiny_llava_gemma"), "'tiny_llava_gemma' is none of tiny_llava_phi, tiny_llava_stablelm"),
        (FACTORY, dict(connector_type="qformer"), "connector_type 'qformer' is not supported, only linear"),
        (FACTORY, dict(connector_type="mof_mlp"), "connector_type 'mof_mlp' is not supported"),
        (FACTORY, dict(text_config={"model_type": "gemma"}), "(?i)text_config.*gemma"),
        (FACTORY, dict(text_config={"model_type": "openelm"}), "(?i)text_config.*openelm"),
        (FACTORY, dict(vision_config={"model_type": "dinov2"}), "'dinov2' is not a vision that.*clip_vision_model"),
        (FACTORY, dict(vision_feature_select_strategy="cls"), "one of patch, cls_patch"),
        (FACTORY, dict(hidden_size=64), "hidden_size is 64 and that of the part's own config 2560"),
        (FACTORY, dict(vision_hidden_size=64), "vision_hidden_size is 64"),
    ],
)
def test_models_that_tinyllava_cannot_be_are_refused(base, change, message):
    with pytest.raises(CheckpointError, match=message):
        FAMILY.read({**base, **change}, TOWER)


@pytest.mark.parametrize(("name", "rows"), [("phi2", 125), ("stablelm2", 127)])
def test_a_release_that_was_saved_with_its_tokenizers_rows_is_taken(name, rows, tmp_path):
    """The authors' loader cuts the embedding to the tokenizer's length; both numbers of rows are published."""
    shutil.copytree(FOLDER / name / "hf", tmp_path / "hf")
    tensors = load_file(tmp_path / "hf/model.safetensors")
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[key] = tensors[key][:rows].clone()
    save_file(tensors, tmp_path / "hf/model.safetensors")
    config = read_config(tmp_path / "hf")
    (tmp_path / "hf/config.json").write_text(json.dumps(config | {"vocab_size": rows}))
    import_hf(tmp_path / "hf", tmp_path / "hf/vision_tower", [FAMILY], tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", FAMILY, tmp_path / "out")
    found = load_file(tmp_path / "out/model.safetensors")
    assert found.keys() == tensors.keys() and all(torch.equal(found[key], tensors[key]) for key in tensors)


def test_a_tuned_tower_comes_from_its_own_repository(tmp_path):
    """A release without the tower's tensors, whose directory holds a block fewer than its config.json counts."""
    source = FOLDER / "tinyllama/hf"
    expected = load_file(source / "model.safetensors")
    shutil.copytree(source, tmp_path / "hf")
    without = {name: tensor for name, tensor in expected.items() if "vision_tower" not in name}
    save_file(without, tmp_path / "hf/model.safetensors")
    import_hf(tmp_path / "hf", source / "vision_tower", [FAMILY], tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", FAMILY, tmp_path / "out")
    found = load_file(tmp_path / "out/model.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def test_any_decoder_with_any_tower_and_projector_is_one_value(tmp_path):
    """CLIP, one linear and Qwen2, which nobody released: read, written and carried over bit for bit."""
    parts = Parts(llms=(qwen2,), visions=(clip,))
    own = llava_line.family(
        name="own", parts=parts, template="qwen2", more={"factory": llava_line.in_factory("own", parts)}
    )
    source = read_config(FOLDER / "factory_qwen2/hf")
    tower = read_config(GOLDEN / "llava/hf_native/hf")["vision_config"]
    config = source | {
        "connector_type": "linear",
        "vision_config": tower,
        "vision_hidden_size": tower["hidden_size"],
        "vision_feature_select_strategy": "patch",
    }
    options = own.read(config, None)
    assert (options.llm.model_type, options.vision.has_class_token, options.projector.kind) == ("qwen2", True, "linear")
    assert own.write(options, "factory") == (config, None)
    table = own.keys["factory"](options)
    shapes = {key: shape for e in table.entries() for key, shape in zip(e.hf, e.hf_shapes, strict=True)}
    release = {key: torch.randn(shape) for key, shape in shapes.items()}
    (tmp_path / "hf").mkdir()
    save_file(release, tmp_path / "hf/model.safetensors")
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    import_hf(tmp_path / "hf", None, [own], tmp_path / "checkpoint")
    assert export_hf(tmp_path / "checkpoint", own, tmp_path / "out") == "factory"
    found = load_file(tmp_path / "out/model.safetensors")
    assert found.keys() == release.keys() and all(torch.equal(found[key], release[key]) for key in release)
    assert read_config(tmp_path / "out") == config


@pytest.mark.parametrize("variant", ["factory_phi2", "factory_qwen2"])
def test_a_start_from_plain_parts_is_the_reference_but_for_its_projector(variant, tmp_path):
    reference = FOLDER / variant / "hf"
    whole, config = load_file(reference / "model.safetensors"), read_config(reference)
    for part, prefix, own in (
        ("llm", "language_model.", config["text_config"]),
        ("tower", "vision_tower._vision_tower.", config["vision_config"]),
    ):
        (tmp_path / part).mkdir()
        tensors = {k.removeprefix(prefix): v for k, v in whole.items() if k.startswith(prefix)}
        save_file(tensors, tmp_path / part / "model.safetensors")
        (tmp_path / part / "config.json").write_text(json.dumps(own))
    checkpoint = open_start(tmp_path / "llm", tmp_path / "tower", FAMILY, seed=3)
    assert {name.split(".")[0] for name in checkpoint.drawn} == {"projector"}
    assert checkpoint.options.llm == FAMILY.read(config, None).llm
    write_checkpoint(checkpoint, tmp_path / "checkpoint", tmp_path / "llm")
    assert export_hf(tmp_path / "checkpoint", FAMILY, tmp_path / "out") == "factory"
    found = load_file(tmp_path / "out/model.safetensors")
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[key], whole[key]) for key in whole if "connector" not in key)
    assert FAMILY.read(read_config(tmp_path / "out"), None).vision == FAMILY.read(config, None).vision


@pytest.mark.parametrize("variant", ["phi2", "stablelm2", "tinyllama", "factory_qwen2"])
def test_a_native_export_gives_the_same_logits_in_transformers(variant, tmp_path):
    """`full` keeps all 25 patches, `default` drops the first."""
    source = FOLDER / variant / "hf"
    tower = source / "vision_tower"
    import_hf(source, tower if tower.exists() else None, [FAMILY], tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", FAMILY, tmp_path / "out", "hf")
    config = read_config(tmp_path / "out")
    assert config["vision_feature_select_strategy"] == ("default" if "factory" in variant else "full")
    case = np.load(FOLDER / variant / "cases/one_image.npz")
    ids = torch.from_numpy(case["input_ids"])
    unused = min(set(range(3, 128)) - set(ids[0].tolist()))
    (tmp_path / "out/config.json").write_text(json.dumps(config | {"image_token_index": unused}))
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", attn_implementation="eager")
    per_image = case["visual_tokens"].shape[1]
    expanded = torch.cat([torch.full((per_image,), unused) if i == IMAGE else i[None] for i in ids[0]])[None]
    with torch.no_grad():
        logits = model(input_ids=expanded, pixel_values=torch.from_numpy(case["pixel_values"])).logits
    assert (logits - torch.from_numpy(case["logits"])).abs().max() < 1e-5
    again = open_hf(tmp_path / "out", None, [FAMILY])
    assert again.info.dialect == "hf"
    back = import_hf(tmp_path / "out", None, [FAMILY], tmp_path / "again")
    assert back.dialect == "hf"
