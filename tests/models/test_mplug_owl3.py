"""mPLUG-Owl3's file: configuration, generations, key names; and its vectors and a plain reference at every layout."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megamm.errors import CheckpointError, ConfigError
from megamm.models import mplug_owl3
from megamm.models.build import units
from megamm.verify import Request, compare, verify
from megamm.weights.convert import export_hf, open_hf, open_start, write_checkpoint
from tests.cases import check_cases, layout_name
from tests.models import owl3_reference

VARIANTS = ("240728", "241101")
CASES = ("one_image", "two_images", "mixed_batch", "text_only")
LAYOUTS = [
    dict(tp=2),
    dict(tp=2, pp=2, sequence_parallel=True, recompute="full"),
    dict(pp=4, layout="VvvPEtt|t|t|L", recompute="full"),  # the second stage has no hyper layer, but hands them on
    dict(tp=2, pp=2, layout="V|vvPE|tt|ttL", sequence_parallel=True),
]


def published(generation: str = "240728", **changes) -> dict:
    """The config.json of 7B-240728 or 7B-241101."""
    is_first = generation == "240728"
    return {
        "architectures": ["mPLUGOwl3Model"],
        "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_mplugowl3.mPLUGOwl3Config"},
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "hidden_size": 3584,
        "hyper_layers": [1, 9, 17, 25] if is_first else [7, 15, 23, 26],
        "initializer_range": 0.02,
        "intermediate_size": 18944,
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "model_type": "mplugowl3",
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2",
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": {
            "hidden_size": 1152,
            "image_size": 384 if is_first else 378,
            "intermediate_size": 4304,
            "model_type": "siglip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 27,
            "patch_size": 14,
        },
        "vocab_size": 151851 if is_first else 151651,
        **changes,
    }


SMALL = dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
             num_key_value_heads=2, hyper_layers=[6, 13, 20, 22], tie_word_embeddings=True)  # fmt: skip


def golden_config(golden, variant):
    return json.loads((golden / "mplug_owl3" / variant / "hf/config.json").read_text())


@pytest.mark.parametrize("config", [published(), published("241101"), published(**SMALL)], ids=["A", "B", "1B"])
def test_reading_and_writing_a_config_changes_nothing(config):
    before = copy.deepcopy(config)
    assert mplug_owl3.write(mplug_owl3.read(config), "original") == (before, None) == (config, None)


def test_the_generation_is_read_from_config_or_keys(golden):
    first, second = mplug_owl3.read(published()), mplug_owl3.read(published("241101"))
    assert (first.llm.hyper.kind, first.projector.kind, first.llm.hyper.layers) == ("gated", "linear", (0, 8, 16, 24))
    assert (second.llm.hyper.kind, second.projector.kind) == ("joint", "mlp2x_gelu")
    assert first.tokens_per_image == second.tokens_per_image == 729
    for variant, kind in zip(VARIANTS, ("gated", "joint"), strict=True):  # both configs are the same, word for word
        checkpoint = open_hf(golden / "mplug_owl3" / variant / "hf", None, [mplug_owl3.FAMILY])
        assert checkpoint.options.llm.hyper.kind == kind
        written, _ = mplug_owl3.write(checkpoint.options, "original")
        assert written == golden_config(golden, variant)
    assert mplug_owl3.complete(published("241101"), ["vision2text_model.0.weight"]) == published("241101")


@pytest.mark.parametrize(
    ("config", "vision", "projector", "llm"),
    [
        (published(), 397_745_440, 4_132_352, 7_614_089_728 + 14_750_208),
        (published("241101"), 397_745_440, 16_980_992, 7_612_656_128 + 14_684_160),
        (published(**SMALL), 397_745_440, 1_033_088, 493_956_608 + 935_168),
    ],
    ids=["A", "B", "1B"],
)
def test_published_sizes(config, vision, projector, llm):
    options = mplug_owl3.read(config)
    found = dict.fromkeys(("vision", "projector", "llm"), 0)
    for entry in mplug_owl3.keys(options).entries():
        found[entry.name.split(".")[0]] += entry.num_elements
    padding = (options.llm.padded_vocab_size - options.llm.vocab_size) * options.llm.hidden_size
    copies = 1 if options.llm.has_tied_embeddings else 2
    # The whole tower is published: less its last block, last norm and head, which are kept and never built.
    assert found["vision"] == 428_225_600 - 15_239_504 - 2_304 - 15_238_352 == vision
    assert (found["projector"], found["llm"] - copies * padding) == (projector, llm)
    estimated = dict.fromkeys(found, 0)
    for unit in units(options, num_tokens=1, num_images=1, seq_length=1):
        estimated[unit.part] += unit.parameters
    assert estimated == found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(model_type="qwen2"), "not of a mplugowl3"),
        (dict(vision_config=None), "not of a mplugowl3"),
        (dict(hyper_layers=[0, 4]), "hyper_layers .* 1 to num_hidden_layers"),
        (dict(hyper_layers=[4, 29]), "hyper_layers .* 1 to num_hidden_layers"),
        (dict(hyper_layers=[]), "hyper_layers"),
        (dict(vision_config={"model_type": "clip_vision_model"}), "clip_vision_model"),
        (dict(use_sliding_window=True), "use_sliding_window"),
        (dict(megamm_generation="250101"), "250101"),
    ],
)
def test_models_that_the_family_cannot_be_are_refused(change, message):
    with pytest.raises(CheckpointError, match=message):
        mplug_owl3.read(published(**change))


def test_a_tower_must_fit_and_may_differ_in_pixels_that_it_does_not_see():
    tower = published()["vision_config"]
    assert mplug_owl3.read(published("241101"), tower).vision.image_size == 378
    with pytest.raises(CheckpointError, match="another tower"):
        mplug_owl3.read(published(), {**tower, "num_hidden_layers": 12})
    with pytest.raises(CheckpointError, match="another tower"):
        mplug_owl3.read(published(), {**tower, "image_size": 224})


def parts_of(release: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Directories of the plain Qwen2 and the plain SigLIP inside a release."""
    tensors, config = load_file(release / "model.safetensors"), json.loads((release / "config.json").read_text())
    new = ("v_kv_proj", "gate_proj.0")
    llm = {k.removeprefix("language_model."): v for k, v in tensors.items() if k.startswith("language_model.")}
    llm = {k: v for k, v in llm.items() if not any(part in k for part in new)}
    tower = {k: v for k, v in tensors.items() if k.startswith("vision_model.")}
    own = {"hyper_layers", "vision_config", "auto_map", "architectures"}
    configs = {k: v for k, v in config.items() if k not in own} | {"model_type": "qwen2"}, config["vision_config"]
    for part, weights, fields in (("llm", llm, configs[0]), ("tower", tower, configs[1])):
        (tmp_path / part).mkdir()
        save_file(weights, tmp_path / part / "model.safetensors")
        (tmp_path / part / "config.json").write_text(json.dumps(fields))
    return tmp_path / "llm", tmp_path / "tower"


def test_a_start_is_made_of_plain_parts(golden, tmp_path):
    release = golden / "mplug_owl3/240728/hf"
    llm, tower = parts_of(release, tmp_path)
    start = open_start(llm, tower, mplug_owl3.FAMILY, seed=3)
    layer = "llm.decoder.layers.0.self_attention."
    drawn = {f"{layer}{x}.{y}" for x in ("linear_image_kv", "gate") for y in ("weight", "bias")}
    assert start.drawn.keys() == drawn | {"projector.linear_1.weight", "projector.linear_1.bias"}
    assert start.options.llm.hyper.layers == (0,)
    assert not start.load(f"{layer}gate.bias").any() and start.load(f"{layer}gate.weight").std() > 0.01
    write_checkpoint(start, tmp_path / "start", llm, tower)
    export_hf(tmp_path / "start", mplug_owl3.FAMILY, tmp_path / "out")
    found, expected = (load_file(path / "model.safetensors") for path in (tmp_path / "out", release))
    same = [key for key in expected if key in found and "layers.0.self_attn" not in key and "2text" not in key]
    assert len(same) > 90 and all(torch.equal(found[key], expected[key]) for key in same)
    assert open_hf(tmp_path / "out", None, [mplug_owl3.FAMILY]).options.llm.hyper.kind == "gated"


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_name)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_case_at_layouts_that_are_not_on_the_ladder(variant, layout, golden, pool):
    directory = golden / "mplug_owl3" / variant
    check_cases(Request(hf=str(directory / "hf"), **layout), [directory / f"cases/{x}.npz" for x in CASES], pool)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", [dict(), dict(tp=2, pp=2, sequence_parallel=True)], ids=layout_name)
def test_without_pictures_everything_that_reads_them_has_a_zero_gradient(variant, layout, golden, pool):
    directory = golden / "mplug_owl3" / variant
    [(_, found)] = verify(Request(hf=str(directory / "hf"), **layout), [directory / "cases/text_only.npz"], pool)
    of_pictures = ("vision_model.", "vision2text_model.")
    unused = [
        key
        for key in found
        if key.removeprefix("grad:").startswith(of_pictures) or "v_kv_proj" in key or "gate_proj.0" in key
    ]
    assert len(unused) == 3 + 2 * 16 + (2 + 8 if variant == "240728" else 4 + 4)
    assert all(np.isfinite(found[key]).all() and not found[key].any() for key in unused)


def make_case(path: Path, weights: dict, config: dict, generation: str, rows: list[tuple[list[int], list[int]]]):
    """A case of rows (ids, starts) with the outputs and gradients of the plain reference -> gradient norms."""
    torch.manual_seed(1)
    weights = {key: value.clone().requires_grad_() for key, value in weights.items()}
    longest, vocab = max(len(ids) for ids, _ in rows), config["vocab_size"]
    ids_BT, mask_BT = np.zeros((len(rows), longest), dtype=np.int64), np.zeros((len(rows), longest), dtype=np.int64)
    labels_BT = np.full_like(ids_BT, -100)
    logits_BTV = np.zeros((len(rows), longest, vocab), dtype=np.float32)
    size = config["vision_config"]["image_size"]
    pictures, image_rows, losses = [torch.empty(0, 3, size, size)], [], []
    for b, (ids, starts) in enumerate(rows):
        pixels = torch.randn(len(starts), 3, size, size)
        logits = owl3_reference.logits(weights, config, ids, starts, pixels, generation)
        losses.append(torch.nn.functional.cross_entropy(logits[3:-1], torch.tensor(ids[4:]), reduction="none"))
        ids_BT[b, : len(ids)], mask_BT[b, : len(ids)], labels_BT[b, 4 : len(ids)] = ids, 1, ids[4:]
        logits_BTV[b, : len(ids)] = logits.detach().numpy()
        pictures.append(pixels)
        image_rows += [b] * len(starts)
    loss = torch.cat(losses).mean()
    loss.backward()
    np.savez(
        path,
        input_ids=ids_BT,
        labels=labels_BT,
        attention_mask=mask_BT,
        expanded_attention_mask=mask_BT,
        pixel_values=torch.cat(pictures).numpy(),
        image_row=np.array(image_rows, dtype=np.int64),
        image_is_dummy=np.zeros(len(image_rows), dtype=np.int64),
        media_offset=np.array([start for _, starts in rows for start in starts], dtype=np.int64),
        media_offset_count=np.array([len(starts) for _, starts in rows], dtype=np.int64),
        logits=logits_BTV,
        loss=loss.item(),
    )
    return {key: value.grad.norm().item() for key, value in weights.items() if value.grad is not None}


def many_rows() -> list[tuple[list[int], list[int]]]:
    """Placeholders of three ordinary ids, which occur elsewhere, too; one at the very beginning, one at the very end,
    two side by side; and a row without any between others."""
    p = [7, 8, 9]
    return [
        ([*p, 7, 21, 22, 23, *p, *p, 8, 24, 25, 26], [0, 7, 10]),
        ([31, 7, 8, 9, 32, 33, 34, 35], []),
        ([41, 42, 43, 44, *p, 45, 46, *p, 47, 48, 7], [4, 9, 14]),
        ([51, 52, 53, 54, 55, 56], [5]),
    ]


@pytest.mark.parametrize("variant", VARIANTS)
def test_placeholders_of_several_tokens(variant, golden, tmp_path, pool):
    """The golden cases have placeholders of one token, and no picture that comes first, last or twice in a row."""
    directory = golden / "mplug_owl3" / variant
    weights, config = load_file(directory / "hf/model.safetensors"), golden_config(golden, variant)
    norms = make_case(tmp_path / "many.npz", weights, config, variant, many_rows())
    for layout in (dict(), dict(tp=2, pp=2, sequence_parallel=True), dict(dp=2)):
        [(case, found)] = verify(Request(hf=str(directory / "hf"), **layout), [tmp_path / "many.npz"], pool)
        report = compare(case, found, norms)
        assert report.ok, report.line()


@pytest.mark.parametrize("variant", VARIANTS)
def test_more_ranks_than_groups_and_tied_embeddings(variant, golden, tmp_path, pool):
    """The small releases: 2 key/value groups, here at tp 4, one embedding, a vocabulary that divides by nothing."""
    source = golden / "mplug_owl3" / variant / "hf"
    config = golden_config(golden, variant) | dict(num_key_value_heads=2, tie_word_embeddings=True, vocab_size=317)
    weights = load_file(source / "model.safetensors")
    del weights["language_model.lm_head.weight"]
    weights["language_model.model.embed_tokens.weight"] = weights["language_model.model.embed_tokens.weight"][:317]
    for key, tensor in weights.items():
        if any(part in key for part in ("language", "layers")) and any(
            f".{x}_proj." in key for x in ("k", "v", "v_kv")
        ):
            weights[key] = tensor[: len(tensor) // 2].clone() if key.startswith("language_model") else tensor
    (tmp_path / "hf").mkdir()
    save_file({key: tensor.contiguous() for key, tensor in weights.items()}, tmp_path / "hf/model.safetensors")
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    norms = make_case(tmp_path / "many.npz", weights, config, variant, many_rows())
    layouts = (dict(), dict(tp=4), dict(tp=4, sequence_parallel=True), dict(tp=2, pp=2, sequence_parallel=True))
    for layout in layouts:
        [(case, found)] = verify(Request(hf=str(tmp_path / "hf"), **layout), [tmp_path / "many.npz"], pool)
        report = compare(case, found, norms)
        assert report.ok, report.line()
    with pytest.raises(ConfigError, match="2 key/value groups.*legal for this model: 1, 2, 4"):
        list(verify(Request(hf=str(tmp_path / "hf"), tp=3), [tmp_path / "many.npz"], pool))


def test_options_say_which_units_read_the_visual_tokens():
    options = mplug_owl3.read(published())
    names = [unit.name for unit in units(options, num_tokens=1, num_images=1, seq_length=1)]
    assert [name for name in names if options.reads_features(name)] == [f"llm.layer.{i}" for i in (0, 8, 16, 24)]
    plain = replace(options, llm=replace(options.llm, hyper=None))
    assert not any(plain.reads_features(name) for name in names)
