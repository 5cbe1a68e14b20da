"""LLaVA's reference vectors at every layout, through verify; and verify fails when it should."""

import json
import shutil

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from megamm.errors import ConfigError, DataError
from megamm.models.vision import clip
from megamm.verify import Request, compare, verify
from tests.cases import check_cases, layout_name

VARIANT = "llava/hf_native"
CASES = ("one_image", "two_images", "mixed_batch", "text_only")
FAST = [
    dict(),
    dict(tp=2, sequence_parallel=True),
    dict(pp=2, layout="Vv|vvPEtttL"),
    dict(tp=2, pp=2, sequence_parallel=True),
    dict(pp=4, layout="Vvvv|PE|tt|tL"),
    dict(tp=4, sequence_parallel=True),
    dict(dp=2),
    dict(pp=2, layout="Vv|vvPE|t|ttL"),
    dict(tp=2, pp=2, layout="V|v|v|vP|Ett|tL", sequence_parallel=True),
]
GRID = [
    dict(tp=tp, pp=pp, sequence_parallel=sp, layout=layout)
    for tp, pp in ((1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2))
    for sp in ((False, True) if tp > 1 else (False,))
    for layout in {
        1: ["auto"],
        2: ["auto", "Vv|vvPEtttL", "Vvvv|PEtttL", "VvvvP|EtttL"],
        4: ["auto", "V|vv|vPEt|ttL", "Vvvv|PE|tt|tL"],
    }[pp]
]


def check(golden, pool, layout):
    directory = golden / VARIANT
    request = Request(hf=str(directory / "hf"), **layout)
    check_cases(request, [directory / f"cases/{case}.npz" for case in CASES], pool, {"expanded_labels"})


@pytest.mark.parametrize("layout", FAST, ids=layout_name)
def test_every_case_equals_the_authors_code(layout, golden, pool):
    check(golden, pool, layout)


@pytest.mark.slow
@pytest.mark.parametrize("layout", GRID, ids=layout_name)
def test_every_case_at_every_layout(layout, golden, pool8):
    check(golden, pool8, layout)


@pytest.mark.parametrize(
    "layout", [dict(), dict(tp=2, pp=2, layout="Vv|vvPE|t|ttL", sequence_parallel=True)], ids=layout_name
)
def test_a_text_only_batch_leaves_exact_zeros_in_tower_and_projector(layout, golden, pool):
    request = Request(hf=str(golden / VARIANT / "hf"), **layout)
    [(_, found)] = verify(request, [golden / VARIANT / "cases/text_only.npz"], pool)
    grads = {key.removeprefix("grad:"): grad for key, grad in found.items() if key.startswith("grad:")}
    unused = [key for key in grads if key.startswith(("vision_tower", "multi_modal_projector"))]
    assert len(unused) == 3 * 16 + 5 + 4
    assert all(not grads[key].any() for key in unused)
    assert all(grads[key].any() for key in grads.keys() - set(unused))


@pytest.mark.parametrize(
    "layout", [dict(), dict(tp=2, pp=2, layout="Vv|vvPE|t|ttL", sequence_parallel=True)], ids=layout_name
)
def test_the_first_stage_normalises_8_bit_pixels(layout, golden, pool, tmp_path):
    arrays = dict(np.load(golden / VARIANT / "cases/two_images.npz"))
    shape = arrays["pixel_values"].shape
    rgb = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    mean, std = (np.reshape(values, (3, 1, 1)) for values in (clip.IMAGE.mean, clip.IMAGE.std))
    normalised = ((rgb / 255 - mean) / std).astype(np.float32)
    for name, pixels in (("8_bit", rgb), ("normalised", normalised)):
        np.savez(tmp_path / f"{name}.npz", **arrays | {"pixel_values": pixels})
    request = Request(hf=str(golden / VARIANT / "hf"), **layout)
    cases = [tmp_path / "8_bit.npz", tmp_path / "normalised.npz", golden / VARIANT / "cases/two_images.npz"]
    [(_, found), (_, expected), (_, other)] = verify(request, cases, pool)
    assert found.keys() == expected.keys()
    assert all(np.abs(found[key] - expected[key]).max() <= 1e-5 for key in found)
    assert np.abs(other["vision_features"] - expected["vision_features"]).max() > 0.1


@pytest.mark.parametrize("layout", [dict(), dict(tp=2, pp=2, sequence_parallel=True)], ids=layout_name)
def test_the_original_spelling_equals_its_authors_code(layout, golden, pool, tmp_path):
    """A VW-LMM is a LLaVA in the original spelling but for a head of its own and the loss that comes with it."""
    release = golden / "vw_lmm/llama"
    tensors = load_file(release / "hf/model.safetensors")
    del tensors["vm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(release / "hf/config.json", tmp_path)
    cases = []
    for case in CASES:
        arrays = dict(np.load(release / f"cases/{case}.npz"))
        shared = {
            key: value for key, value in arrays.items() if not key.startswith(("grad:", "vw_", "visual_", "loss"))
        }
        cases.append(tmp_path / f"{case}.npz")
        np.savez(cases[-1], **shared | {"loss": arrays["loss_lm"]})
    request = Request(hf=str(tmp_path), tower=str(release / "hf/vision_tower"), **layout)
    seen = []
    for case, found in verify(request, cases, pool):
        report = compare(case, found, None)
        assert report.ok, report.line()
        assert {"logits", "loss", "layer_outputs"} <= report.differences.keys()
        seen.append(case.name)
    assert tuple(seen) == CASES


@pytest.fixture
def perturbed(golden, tmp_path):
    """The golden checkpoint with one number of one tensor changed."""

    def make(key):
        directory = tmp_path / key
        shutil.copytree(golden / VARIANT / "hf", directory)
        tensors = load_file(directory / "model.safetensors")
        tensors[key].view(-1)[3] += 0.05
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory

    return make


@pytest.mark.parametrize(
    ("key", "seen_in"),
    [
        ("vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight", "vision_features"),
        ("multi_modal_projector.linear_2.weight", "visual_tokens"),
        ("language_model.model.layers.2.self_attn.v_proj.weight", "logits"),
    ],
)
def test_one_wrong_weight_is_found(key, seen_in, golden, perturbed, pool):
    request = Request(hf=str(perturbed(key)), tp=2)
    [(case, found)] = verify(request, [golden / VARIANT / "cases/one_image.npz"], pool)
    report = compare(case, found, None)
    assert not report.ok
    assert report.differences[seen_in] > 1e-4
    assert json.loads(report.line())["ok"] is False


def test_an_unused_weight_may_differ(golden, perturbed, pool):
    hf = perturbed("vision_tower.vision_model.encoder.layers.3.mlp.fc1.weight")
    [(case, found)] = verify(Request(hf=str(hf)), [golden / VARIANT / "cases/one_image.npz"], pool)
    assert compare(case, found, None).ok


def test_wrong_gradients_and_nan_are_not_ok(golden, pool):
    directory = golden / VARIANT
    norms = json.loads((directory / "grad_norms.json").read_text())["one_image"]
    [(case, found)] = verify(Request(hf=str(directory / "hf")), [directory / "cases/one_image.npz"], pool)
    assert compare(case, found, norms).ok
    key = "language_model.model.norm.weight"
    assert not compare(case, found, {**norms, key: norms[key] * 1.001}).ok
    assert not compare(case, found, {**norms, "no.such.key": 1.0}).ok
    found["logits"] = np.full_like(found["logits"], np.nan)
    assert not compare(case, found, norms).ok


def test_what_cannot_run_is_refused_before_ranks_start(golden, tmp_path):
    hf = str(golden / VARIANT / "hf")
    case = golden / VARIANT / "cases/one_image.npz"
    with pytest.raises(ConfigError, match="tp=3 does not fit"):
        list(verify(Request(hf=hf, tp=3), [case]))
    with pytest.raises(ConfigError, match="the model has V 1, v 3, P 1, E 1, t 3, L 1"):
        list(verify(Request(hf=hf, pp=2, layout="Vv|tL"), [case]))
    broken = tmp_path / "broken.npz"
    broken.write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(DataError, match="not a verification case"):
        list(verify(Request(hf=hf), [broken]))
