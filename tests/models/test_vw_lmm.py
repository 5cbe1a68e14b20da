"""VW-LMM's file: configuration, key names, weights, the authors' outputs and gradients at every layout, bad input."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from megamm import backend
from megamm.config.schema import Parallel
from megamm.errors import CheckpointError
from megamm.models import vw_lmm
from megamm.models.build import build_stages, units
from megamm.models.parameters import canonical_parameters
from megamm.models.spec import Build
from megamm.parallel import groups
from megamm.parallel.placement import parse_layout
from megamm.registry import FAMILIES
from megamm.verify import Request, verify
from megamm.weights.convert import export_hf, import_hf, open_hf, open_start, write_checkpoint
from megamm.weights.directory import TOWER
from megamm.weights.hf import read_config
from megamm.weights.torch_dist import StoredTensors
from tests.cases import check_cases, layout_name
from tests.models.words import VARIANTS, odd_release
from tests.weights.test_convert import loaded

CASES = ("one_image", "two_images", "mixed_batch", "text_only")
LAYOUTS = [dict(), dict(pp=4, layout="Vvvv|PE|tt|tL"), dict(tp=2, pp=2, layout="Vvvv|PEt|tt|L", sequence_parallel=True)]
HEAD = "words.vm_head.weight"


@pytest.fixture
def release(golden):
    return lambda variant: golden / "vw_lmm" / variant / "hf"


def configs(directory):
    return tuple(json.loads((path / "config.json").read_text()) for path in (directory, directory / "vision_tower"))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_name)
def test_every_case_equals_the_authors_code(layout, variant, golden, pool):
    directory = golden / "vw_lmm" / variant
    hf = str(directory / "hf")
    request = Request(hf=hf, tower=f"{hf}/vision_tower", family=VARIANTS[variant].name, **layout)
    reports = check_cases(request, [directory / f"cases/{case}.npz" for case in CASES], pool)
    needed = {"loss_lm", "vw_kl_stage4", "vw_kl_stage3", "visual_words"}
    needed |= {"pseudo_image_features"} if variant == "pif" else set()
    assert {case for case in reports if not needed <= reports[case].differences.keys()} == {"text_only"}


@pytest.mark.parametrize("variant", ["llama", "pif"])
@pytest.mark.parametrize("layout", [dict(), dict(tp=2, pp=2, sequence_parallel=True)], ids=layout_name)
def test_a_text_only_batch_is_finite_and_leaves_exact_zeros(layout, variant, golden, pool):
    directory = golden / "vw_lmm" / variant
    request = Request(
        hf=str(directory / "hf"), tower=str(directory / "hf/vision_tower"), family=VARIANTS[variant].name, **layout
    )
    [(_, found)] = verify(request, [directory / "cases/text_only.npz"], pool)
    assert found["vw_kl_stage4"] == found["vw_kl_stage3"] == 0
    assert found["loss"] == found["loss_lm"]
    zeros = [key for key in found if key.startswith("grad:") and not found[key].any()]
    assert "grad:vm_head.weight" in zeros and "grad:model.mm_projector.0.weight" in zeros
    assert "grad:lm_head.weight" not in zeros and "grad:model.embed_tokens.weight" not in zeros


@pytest.mark.parametrize("variant", ["llama", "pif"])
def test_a_padded_vocabulary_takes_no_part(variant, release, golden, pool, tmp_path):
    """125 words at tp 4, 32 columns a rank: loss and gradients as on one rank, whose last columns are padding, too;
    and the divergence that torch finds over 125."""
    hf = odd_release(release(variant), tmp_path / "hf")
    arrays = dict(np.load(golden / "vw_lmm" / variant / "cases/mixed_batch.npz"))
    for key in ("input_ids", "labels"):
        arrays[key] = np.minimum(arrays[key], 124)
    np.savez(case := tmp_path / "case.npz", **arrays)
    results = []
    for layout in (dict(), dict(tp=4, sequence_parallel=True), dict(tp=2, pp=2, layout="VvvvPE|tttL")):
        request = Request(hf=str(hf), tower=str(hf / "vision_tower"), family=VARIANTS[variant].name, **layout)
        [(loaded_case, found)] = verify(request, [case], pool)
        results.append(found)
    one = results[0]
    words = torch.from_numpy(one["visual_words"]).double()
    assert words.shape[-1] == 125 and torch.allclose(words.sum(-1), torch.ones(2, 9, dtype=torch.float64))
    expected = divergence(loaded_case, words.flatten(0, 1), torch.from_numpy(one["logits"]).double())
    assert one["vw_kl_stage4"] == pytest.approx(expected[0], abs=1e-5)
    assert one["vw_kl_stage3"] == pytest.approx(expected[1], abs=1e-5)
    for other in results[1:]:
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-5)
        for key in (key for key in one if key.startswith("grad:")):
            difference = abs(other[key] - one[key]).max()
            assert difference <= 1e-4 * abs(one[key]).max() + 1e-7, key


def divergence(case, words_RV, logits_BSV):
    """KL(p || q) and KL(q || p), means over the visual tokens that something stands before."""
    rows, sums = iter(words_RV), []
    for b, sample in enumerate(case.samples):
        for t, token in enumerate(sample.ids_S.tolist()):
            if token == -200 and (p := next(rows)) is not None and t > 0:
                q = logits_BSV[b, t - 1].softmax(-1)
                sums.append(torch.stack([(p * (p.log() - q.log())).sum(), (q * (q.log() - p.log())).sum()]))
    return torch.stack(sums).mean(0).tolist()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_llm_and_what_it_reads_are_found(variant, release):
    options = VARIANTS[variant].read(*configs(release(variant)))
    assert (options.has_visual_words, options.has_pseudo_features) == (True, variant == "pif")
    assert options.llm.model_type == ("mistral" if variant == "mistral" else "llama")


def describe_parameters(tp, layout, options, family_name):
    """Canonical name and local shape of every parameter that this rank builds."""
    backend.start("cpu")
    table = FAMILIES[family_name].keys["original"](options)
    cut = parse_layout(layout, units(options, num_tokens=8, num_images=1, seq_length=8), layout.count("|") + 1)
    groups.start_distributed()
    groups.start(Parallel(tp=tp, pp=cut.pp), cut)
    stages = build_stages(options, Build(tp=tp, layout=cut), table)
    return [(name, tuple(p.shape)) for name, p in canonical_parameters(stages)]


@pytest.mark.parametrize("variant", ["mistral", "pif"])
def test_with_pseudo_features_two_stages_have_the_head(variant, release, pool):
    family = VARIANTS[variant]
    options = family.read(*configs(release(variant)))
    assert [e.name for e in family.keys["hf"](options).entries() if not e.is_exported] == [HEAD]
    for cut, ranks, stages in (("VvvvPEtttL", 2, 1), ("VvvvPE|tttL", 4, 2)):
        found = pool.run(describe_parameters, 2, cut, options, family.name, ranks=ranks)
        heads = [shape for rank in found for name, shape in rank if name == HEAD]
        assert heads == [(64, 64)] * 2 * (stages if variant == "pif" else 1)


def test_published_sizes():
    config = {
        "model_type": "llava", "mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_hidden_size": 1024,
        "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "image_aspect_ratio": "pad",
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    tower = {
        "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
    }  # fmt: skip
    unused = 12_596_224 + 2 * 1024  # the tower's last block and norm, kept beside
    mistral = dict(intermediate_size=14336, num_key_value_heads=8, sliding_window=None, max_position_embeddings=32768)
    for family in (vw_lmm.FAMILY, vw_lmm.PIF):
        for changes, published in (({}, 7_193_974_784), (mistral, 7_697_291_264)):
            flat = units(family.read({**config, **changes}, tower), num_tokens=1, num_images=1, seq_length=1)
            assert sum(unit.parameters for unit in flat) == published - unused


def without_head(hf, to, tower=True):
    shutil.copytree(hf, to)
    tensors = load_file(to / "model.safetensors")
    del tensors["vm_head.weight"]
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


def test_the_head_tells_the_family_and_pseudo_features_must_be_named(release, tmp_path):
    hf = release("llama")
    known = list(FAMILIES.values())
    assert open_hf(hf, hf / "vision_tower", known).family.name == "vw_lmm"
    plain = without_head(hf, tmp_path / "plain")
    assert open_hf(plain, hf / "vision_tower", known).family.name == "llava"
    assert open_hf(release("pif"), hf / "vision_tower", [vw_lmm.PIF]).options.has_pseudo_features
    tensors = load_file(hf / "model.safetensors")
    save_file({**tensors, "vm_head.bias": torch.zeros(128)}, plain / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="vw_lmm: .*fit no dialect(?s:.*)not in its table: vm_head.bias"):
        open_hf(plain, hf / "vision_tower", known)


@pytest.mark.parametrize("family", [vw_lmm.FAMILY, vw_lmm.PIF], ids=lambda family: family.name)
@pytest.mark.parametrize("source", ["vw_lmm/llama", "llava/hf_native"])
def test_a_plain_llava_begins_with_the_llms_head(source, family, golden, tmp_path):
    """In either spelling; and that head is a weight of its own from then on."""
    hf, tower = golden / source / "hf", None
    if source == "vw_lmm/llama":
        hf, tower = without_head(hf, tmp_path / "plain"), hf / "vision_tower"
    found = open_hf(hf, tower, [family])
    assert found.duplicated == {HEAD: "llm.output_layer.weight"}
    assert ("words", "duplicated", str(hf)) in found.origins()
    write_checkpoint(found, tmp_path / "checkpoint", hf)
    stored = StoredTensors(tmp_path / "checkpoint")
    assert torch.equal(stored.read(HEAD), stored.read("llm.output_layer.weight"))
    export_hf(tmp_path / "checkpoint", family, tmp_path / "back", "original")
    back = loaded(tmp_path / "back")
    assert torch.equal(back["vm_head.weight"], back["lm_head.weight"])
    again = open_hf(tmp_path / "back", tmp_path / "back" / TOWER, [family])
    assert not again.duplicated and again.info.dialect == "original"


@pytest.mark.parametrize("family", [vw_lmm.FAMILY, vw_lmm.PIF], ids=lambda family: family.name)
def test_a_start_of_a_plain_llm_and_tower(family, release, tmp_path):
    hf = release("llama")
    llm_config = {key: value for key, value in read_config(hf).items() if not key.startswith("mm_")}
    tensors = load_file(hf / "model.safetensors")
    llm = {key: tensor for key, tensor in tensors.items() if "vision_tower" not in key and "mm_projector" not in key}
    del llm["vm_head.weight"]
    (tmp_path / "llm").mkdir()
    save_file(llm, tmp_path / "llm/model.safetensors", metadata={"format": "pt"})
    (tmp_path / "llm/config.json").write_text(json.dumps({**llm_config, "model_type": "llama"}))
    start = open_start(tmp_path / "llm", hf / "vision_tower", family, seed=1)
    assert {how: names for (_, how, _), names in start.origins().items()}["duplicated"] == [HEAD]
    assert sorted(start.drawn) == sorted(e.name for e in start.table.entries() if e.name.startswith("projector."))
    assert start.info.dialect == "original"
    assert torch.equal(start.load(HEAD), tensors["lm_head.weight"])
    write_checkpoint(start, tmp_path / "start", tmp_path / "llm")
    export_hf(tmp_path / "start", family, tmp_path / "back")
    assert read_config(tmp_path / "back")["model_type"] == "llava"


@pytest.mark.parametrize("variant", ["llama", "mistral"])
def test_the_native_export_leaves_the_head_out_and_computes_the_same(variant, release, golden, tmp_path, caplog):
    hf = release(variant)
    import_hf(hf, hf / "vision_tower", [vw_lmm.FAMILY], tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", vw_lmm.FAMILY, tmp_path / "native", "hf")
    assert f"left out, since dialect hf has no place for it: {HEAD}" in caplog.text
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "native").eval()
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    case = {key: torch.from_numpy(x) for key, x in np.load(golden / f"vw_lmm/{variant}/cases/two_images.npz").items()}
    with torch.no_grad():  # in two halves: no id of this vocabulary stands for a visual token
        visual = torch.stack(list(model.model.get_image_features(case["pixel_values"]).pooler_output))
        logits = model(inputs_embeds=case["expanded_embeds"]).logits
    assert torch.allclose(visual, case["visual_tokens"], rtol=0, atol=1e-5)
    assert torch.allclose(logits, case["logits"], rtol=0, atol=1e-5)
    assert not any("vm_head" in key for key in loaded(tmp_path / "native"))
    again = open_hf(tmp_path / "native", None, [vw_lmm.FAMILY])
    assert again.duplicated and again.info.dialect == "hf"


def test_pseudo_features_are_refused_natively(release, tmp_path):
    hf = release("pif")
    import_hf(hf, hf / "vision_tower", [vw_lmm.PIF], tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match="cannot hold a vw_lmm_pif.*--dialect original"):
        export_hf(tmp_path / "checkpoint", vw_lmm.PIF, tmp_path / "native", "hf")
    assert not (tmp_path / "native").exists()


def test_a_plain_llavas_config_is_written_as_a_vw_lmm(release):
    config, tower = configs(release("mistral"))
    options = vw_lmm.FAMILY.read({**config, "model_type": "llava_mistral"}, tower)
    assert vw_lmm.FAMILY.write(options, "original") == (config, tower)
    with pytest.raises(CheckpointError, match="model_type 'llava_qwen' is none of llava, llava_mistral"):
        vw_lmm.FAMILY.read({**config, "model_type": "llava_qwen"}, tower)
    fresh = vw_lmm.FAMILY.write(replace(options, hf={}, tower_hf=None), "original")[0]
    assert fresh["architectures"] == ["vwMistralForCausalLM"]
