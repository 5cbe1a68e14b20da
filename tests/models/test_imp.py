"""Imp's file: its three decoders and four spellings, published sizes, a start from plain parts, native export."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from megamm.batch import IMAGE
from megamm.errors import CheckpointError, ConfigError
from megamm.models import imp
from megamm.models.build import units
from megamm.verify import Request, compare, verify
from megamm.weights.convert import export_hf, import_hf, open_hf, open_start, write_checkpoint
from tests.families import GOLDEN

TOWER = dict(
    hidden_size=1152, image_size=384, intermediate_size=4304, model_type="siglip_vision_model", num_attention_heads=16,
    num_hidden_layers=27, patch_size=14, layer_norm_eps=1e-6, hidden_act="gelu_pytorch_tanh",
)  # fmt: skip
SHARED = dict(
    image_aspect_ratio="square", image_token="<image>", mm_hidden_size=1152, mm_projector_lr=2e-5,
    mm_projector_type="mlp2x_gelu", mm_use_im_patch_token=False, mm_use_im_start_end=False,
    mm_vision_select_feature="patch", mm_vision_select_layer=-2, mm_vision_tower="google/siglip-so400m-patch14-384",
    tokenizer_model_max_length=3072, tokenizer_padding_side="right", torch_dtype="float16", use_mm_proj=True,
    vision_tower_config=TOWER,
)  # fmt: skip
PHI2 = SHARED | dict(
    activation_function="gelu_new", architectures=["ImpForCausalLM"], attn_pdrop=0.0, embd_pdrop=0.0,
    eos_token_id=50295, hidden_size=2560, image_token_index=50296, intermediate_size=10240, layer_norm_eps=1e-5,
    max_position_embeddings=2048, model_type="imp", num_attention_heads=32, num_hidden_layers=32,
    num_key_value_heads=None, pad_token_id=50256, partial_rotary_factor=0.4, resid_pdrop=0.1, vocab_size=51200,
)  # fmt: skip
LEGACY = SHARED | dict(
    activation_function="gelu_new", architectures=["ImpForCausalLM"], attn_pdrop=0.0, flash_attn=False,
    image_token_index=50296, layer_norm_epsilon=1e-5, model_type="imp", n_embd=2560, n_head=32, n_head_kv=None,
    n_inner=None, n_layer=32, n_positions=2048, rotary_dim=32, vocab_size=51200,
)  # fmt: skip
QWEN = SHARED | dict(
    architectures=["ImpQwen2ForCausalLM"], hidden_act="silu", hidden_size=2048, image_token_index=151646,
    intermediate_size=5504, max_position_embeddings=32768, max_window_layers=21, model_type="imp_qwen2",
    num_attention_heads=16, num_hidden_layers=24, num_key_value_heads=16, rms_norm_eps=1e-6, rope_theta=1000000.0,
    sliding_window=32768, tie_word_embeddings=False, use_sliding_window=False, vocab_size=151936,
)  # fmt: skip
PHI3 = SHARED | dict(
    architectures=["ImpPhi3ForCausalLM"], attention_bias=False, hidden_act="silu", hidden_size=3072,
    image_aspect_ratio="pad", intermediate_size=8192, max_position_embeddings=4096, model_type="imp_phi3",
    num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=32, original_max_position_embeddings=4096,
    rms_norm_eps=1e-5, rope_scaling=None, rope_theta=10000.0, sliding_window=2047, tie_word_embeddings=False,
    vocab_size=32064,
)  # fmt: skip
PUBLISHED = {"phi2": PHI2, "legacy": LEGACY, "qwen": QWEN, "phi3": PHI3}


@pytest.mark.parametrize("name", PUBLISHED)
def test_reading_and_writing_a_published_config_changes_nothing(name):
    config = PUBLISHED[name]
    before = copy.deepcopy(config)
    assert imp.write(imp.read(config), "legacy" if name == "legacy" else "original") == (before, None)
    assert config == before


@pytest.mark.parametrize(
    ("name", "total"), [("phi2", 3_186_937_120), ("legacy", 3_186_937_120), ("qwen", 2_241_131_808),
                        ("phi3", 4_231_807_264 + 2 * 64 * 3072)]
)  # fmt: skip
def test_published_sizes(name, total):
    """Phi-3's vocabulary of 32064 is padded to 32128 rows."""
    options = imp.read(PUBLISHED[name])
    assert sum(unit.parameters for unit in units(options, num_tokens=1, num_images=1, seq_length=1)) == total
    assert (options.tokens_per_image, options.vision.num_layers, options.max_tokens) == (729, 26, 3072)
    assert options.llm.window == (2047 if name == "phi3" else None)


def test_both_spellings_of_phi2_are_the_same_model_and_translate_into_each_other():
    old, new = imp.read(LEGACY), imp.read(PHI2)
    assert (old.llm, old.vision, old.projector) == (new.llm, new.vision, new.projector)
    for options, dialect in ((old, "original"), (new, "legacy")):
        assert imp.read(imp.write(options, dialect)[0]).llm == options.llm
    assert {"n_embd", "rotary_dim"} <= imp.write(new, "legacy")[0].keys()
    assert "n_embd" not in imp.write(old, "original")[0]


@pytest.mark.parametrize("dialect", ["original", "legacy"])
def test_an_export_in_the_other_spelling_has_the_names_of_that_revision(dialect, tmp_path):
    """The reference has the same weights under both revisions' names."""
    folders = {"legacy": GOLDEN / "imp/phi2_legacy/hf", "original": GOLDEN / "imp/phi2_legacy/hf_current_names"}
    source = folders["legacy" if dialect == "original" else "original"]
    import_hf(source, None, [imp.FAMILY], tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", imp.FAMILY, tmp_path / "out", dialect)
    expected, found = (load_file(path / "model.safetensors") for path in (folders[dialect], tmp_path / "out"))
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    options = [
        imp.read(json.loads((path / "config.json").read_text())) for path in (folders[dialect], tmp_path / "out")
    ]
    assert options[0].llm == options[1].llm


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(model_type="imp_gemma"), "'imp_gemma' is none of imp, imp_qwen2, imp_phi3"),
        (dict(hidden_act="relu", activation_function="relu"), "phi with hidden_act 'relu' is not supported"),
        (dict(qk_layernorm=True), "qk_layernorm True"),
        (dict(rope_scaling={"type": "longrope"}), "rotary scaling 'longrope'"),
        (dict(mm_projector_type="linear"), "mm_projector_type 'linear'"),
        (dict(mm_hidden_size=1024), "mm_hidden_size is 1024"),
        (dict(image_aspect_ratio="crop"), "image_aspect_ratio 'crop'"),
    ],
)
def test_models_that_imp_cannot_be_are_refused(change, message):
    with pytest.raises(CheckpointError, match=message):
        imp.read({**PHI2, **change})


def test_a_tower_that_contradicts_the_config_is_refused():
    assert imp.read(PHI2, TOWER).vision == imp.read(PHI2).vision
    with pytest.raises(CheckpointError, match="num_heads 16, the --tower's config.json 8"):
        imp.read(PHI2, {**TOWER, "num_attention_heads": 8})
    without = {key: value for key, value in PHI2.items() if key != "vision_tower_config"}
    with pytest.raises(CheckpointError, match="--tower"):
        imp.read(without)
    assert imp.write(imp.read(without, TOWER), "original") == (without, TOWER)


@pytest.mark.parametrize("name", ["gemma", "openelm"])
def test_decoders_that_megamm_has_not_are_refused_by_name(name):
    with pytest.raises(CheckpointError, match=f"(?i)the llm's config.json: megamm does not support {name}"):
        imp.FAMILY.compose({"model_type": name}, TOWER)


def test_what_a_dialect_cannot_hold_is_refused():
    with pytest.raises(CheckpointError, match="bias on the head"):
        imp.write(imp.read(PHI2), "hf")
    with pytest.raises(CheckpointError, match="no llm but Phi-2, and this one is qwen2"):
        imp.write(imp.read(QWEN), "legacy")


def test_tensor_parallel_sizes_that_do_not_divide_are_named(golden):
    with pytest.raises(ConfigError, match=r"tp=3 does not fit.*legal for this model: 1, 2, 4"):
        list(verify(Request(hf=str(golden / "imp/phi3/hf"), tp=3), [golden / "imp/phi3/cases/one_image.npz"]))


def plain_llm(variant, directory):
    """The llm of a reference model as a directory of its own, as its makers publish it."""
    source = GOLDEN / "imp" / variant / "hf"
    options = imp.read(json.loads((source / "config.json").read_text()))
    directory.mkdir()
    config = imp.PARTS.llm(options.llm).to_hf(options.llm, {})
    (directory / "config.json").write_text(json.dumps(config))
    tensors = load_file(source / "model.safetensors")
    parts = ("model.vision_tower", "model.mm_projector")
    save_file(
        {name: tensor for name, tensor in tensors.items() if not name.startswith(parts)},
        directory / "model.safetensors",
    )


@pytest.mark.parametrize("variant", ["phi2", "phi3", "qwen1_5"])
def test_a_start_from_plain_parts_is_the_reference_but_for_its_projector(variant, tmp_path):
    plain_llm(variant, tmp_path / "llm")
    reference = GOLDEN / "imp" / variant / "hf"
    checkpoint = open_start(tmp_path / "llm", reference / "vision_tower", imp.FAMILY, seed=3)
    assert {name.split(".")[0] for name in checkpoint.drawn} == {"projector"}
    assert checkpoint.info.dialect == "original"
    assert checkpoint.options.max_tokens == (3072 if variant == "phi2" else 2560)
    assert checkpoint.options.llm == imp.read(json.loads((reference / "config.json").read_text())).llm
    write_checkpoint(checkpoint, tmp_path / "checkpoint", tmp_path / "llm")
    assert export_hf(tmp_path / "checkpoint", imp.FAMILY, tmp_path / "out") == "original"
    expected, found = (load_file(path / "model.safetensors") for path in (reference, tmp_path / "out"))
    # The release leaves out the tower's unused last block, the tower's own directory has it.
    assert expected.keys() <= found.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected if "mm_projector" not in key)
    again = open_hf(tmp_path / "out", None, [imp.FAMILY])
    assert (again.options.llm, again.options.vision) == (checkpoint.options.llm, checkpoint.options.vision)


@pytest.mark.parametrize("variant", ["phi3", "qwen1_5"])
def test_a_native_export_gives_the_same_logits_in_transformers(variant, tmp_path):
    source, case = GOLDEN / "imp" / variant, np.load(GOLDEN / "imp" / variant / "cases/one_image.npz")
    shutil.copytree(source / "hf", tmp_path / "hf")
    ids = torch.from_numpy(case["input_ids"])
    unused = min(set(range(3, 128)) - set(ids[0].tolist()))
    config = json.loads((source / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps(config | {"image_token_index": unused}))
    import_hf(tmp_path / "hf", source / "hf/vision_tower", [imp.FAMILY], tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", imp.FAMILY, tmp_path / "out", "hf")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", attn_implementation="eager")
    expanded = torch.cat([torch.full((25,), unused) if i == IMAGE else i[None] for i in ids[0]])[None]
    logits = model(input_ids=expanded, pixel_values=torch.from_numpy(case["pixel_values"])).logits
    assert (logits - torch.from_numpy(case["logits"])).abs().max() < 1e-5
    again = open_hf(tmp_path / "out", None, [imp.FAMILY])
    assert again.info.dialect == "hf" and again.options.llm == imp.read(config).llm


def test_the_current_names_of_the_first_revision_are_exact_too(golden, pool):
    """The legacy reference renamed, at a layout that cuts the head's bias."""
    directory = golden / "imp/phi2_legacy"
    request = Request(hf=str(directory / "hf_current_names"), tp=2, pp=2, sequence_parallel=True)
    arrays = dict(np.load(directory / "cases/mixed_batch.npz"))
    [(case, found)] = verify(request, [directory / "cases/mixed_batch.npz"], pool)
    case.expected.clear()
    case.expected.update({key: value for key, value in arrays.items() if not key.startswith("grad:")})
    del case.expected["vision_features"], case.expected["visual_tokens"]
    assert compare(case, found, None).ok
    np.testing.assert_allclose(found["grad:lm_head.bias"], arrays["grad:lm_head.linear.bias"], atol=1e-5)
