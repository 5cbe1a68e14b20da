"""HF -> megamm -> HF gives back every bit; what does not fit is refused and leaves nothing; memory stays bounded."""

import itertools
import json
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from megamm.errors import CheckpointError
from megamm.models import llava
from megamm.weights import convert, directory, torch_dist
from megamm.weights.convert import export_hf, import_hf, open_hf, open_start
from megamm.weights.directory import find_checkpoint, read_info
from megamm.weights.draw import draw
from megamm.weights.hf import HfSource, read_config
from megamm.weights.torch_dist import StoredTensors
from tests.weights import tiny

GOLDEN = Path(__file__).parents[1] / "golden" / "llava" / "hf_native" / "hf"
ORIGINAL = Path(__file__).parents[1] / "golden" / "vw_lmm" / "llama" / "hf"
VISION = "model.vision_tower.vision_tower.vision_model."


def loaded(directory):
    source = HfSource(directory)
    return {name: source.read(name) for name in source.infos}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_shard_bytes", [None, 3000])
def test_round_trip_gives_back_every_bit(tmp_path, dtype, max_shard_bytes):
    release = tiny.tensors(dtype=dtype)
    hf = tiny.write_release(tmp_path / "hf", release, max_shard_bytes=max_shard_bytes)
    info = import_hf(hf, None, [tiny.FAMILY], tmp_path / "checkpoint")
    assert (info.family, info.dialect, info.hf_config) == ("tiny", "plain", tiny.CONFIG)
    assert read_info(tmp_path / "checkpoint") == info
    assert export_hf(tmp_path / "checkpoint", tiny.FAMILY, tmp_path / "back") == "plain"
    assert_same(loaded(tmp_path / "back"), release)
    expected = {"torch_dtype": str(dtype).removeprefix("torch.")}
    assert read_config(tmp_path / "back") == tiny.CONFIG | expected


def test_llava_round_trip_gives_back_every_bit(tmp_path):
    info = import_hf(GOLDEN, None, [llava.FAMILY, tiny.FAMILY], tmp_path / "checkpoint")
    assert (info.family, info.dialect) == ("llava", "hf")
    export_hf(tmp_path / "checkpoint", llava.FAMILY, tmp_path / "back")
    assert_same(loaded(tmp_path / "back"), load_file(GOLDEN / "model.safetensors"))
    assert read_config(tmp_path / "back") == read_config(GOLDEN)
    kept = HfSource.of_file(tmp_path / "checkpoint" / directory.KEPT).infos
    assert len(kept) == 18 and all("layers.3." in name or "post_layernorm" in name for name in kept)


@pytest.mark.parametrize("dialect", llava.FAMILY.keys)
def test_llava_is_imported_from_every_dialect_it_is_exported_in(tmp_path, dialect):
    import_hf(GOLDEN, None, [llava.FAMILY], tmp_path / "first")
    export_hf(tmp_path / "first", llava.FAMILY, tmp_path / "spelt", dialect)
    tower = tmp_path / "spelt" / directory.TOWER if dialect == "original" else None
    assert import_hf(tmp_path / "spelt", tower, [llava.FAMILY], tmp_path / "second").dialect == dialect
    export_hf(tmp_path / "second", llava.FAMILY, tmp_path / "back", "hf")
    assert_same(loaded(tmp_path / "back"), load_file(GOLDEN / "model.safetensors"))


@pytest.mark.parametrize("model, level, head", list(itertools.product([True, False], repeat=3)))
def test_every_combination_of_native_prefixes_is_imported_and_exported_as_published(tmp_path, model, level, head):
    def spell(name):
        name = name if level else name.replace("vision_tower.vision_model.", "vision_tower.")
        if name.startswith("language_model.lm_head."):
            return name if head else name.removeprefix("language_model.")
        return "model." + name.replace("language_model.model.", "language_model.") if model else name

    expected = load_file(GOLDEN / "model.safetensors")
    hf = tiny.write_release(tmp_path / "hf", {spell(k): v for k, v in expected.items()}, read_config(GOLDEN))
    assert import_hf(hf, None, [llava.FAMILY], tmp_path / "checkpoint").dialect == "hf"
    export_hf(tmp_path / "checkpoint", llava.FAMILY, tmp_path / "back")
    assert_same(loaded(tmp_path / "back"), expected)


def original(with_tower=True):
    """The tensors of a LLaVA in the authors' spelling: a VW-LMM without its extra head, and an old buffer or two."""
    whole = load_file(ORIGINAL / "model.safetensors")
    whole = {name: tensor for name, tensor in whole.items() if with_tower or "vision_tower" not in name}
    del whole["vm_head.weight"]
    return whole | {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.arange(8.0)}


def test_the_original_spelling_comes_back_bit_for_bit(tmp_path):
    position_ids = {f"{VISION}embeddings.position_ids": torch.arange(10)}
    hf = tiny.write_release(tmp_path / "hf", original() | position_ids, read_config(ORIGINAL))
    info = import_hf(hf, ORIGINAL / "vision_tower", [llava.FAMILY], tmp_path / "checkpoint")
    assert (info.dialect, info.tower_config) == ("original", read_config(ORIGINAL / "vision_tower"))
    export_hf(tmp_path / "checkpoint", llava.FAMILY, tmp_path / "back")
    assert_same(loaded(tmp_path / "back"), original() | position_ids)
    assert read_config(tmp_path / "back") == read_config(ORIGINAL)
    assert read_config(tmp_path / "back" / directory.TOWER) == info.tower_config


@pytest.mark.parametrize("num_shards, index", [(1, False), (3, False), (3, True)])
def test_pytorch_files_without_a_tower_are_filled_from_its_directory(tmp_path, num_shards, index):
    own = {f"{VISION}pre_layrnorm.bias": torch.full((32,), 9.0)}
    release = original(with_tower=False) | own
    shards = [dict(list(release.items())[k::num_shards]) for k in range(num_shards)]
    hf = tiny.write_bin(tmp_path / "hf", shards, read_config(ORIGINAL), index)
    import_hf(hf, ORIGINAL / "vision_tower", [llava.FAMILY], tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", llava.FAMILY, tmp_path / "back")
    assert_same(loaded(tmp_path / "back"), original() | own)


def test_a_linear_projector_is_spelt_in_the_original_only(tmp_path):
    release = {name: tensor for name, tensor in original().items() if "mm_projector" not in name}
    release |= {"model.mm_projector.weight": torch.randn(64, 32), "model.mm_projector.bias": torch.randn(64)}
    config = read_config(ORIGINAL) | {"mm_projector_type": "linear"}
    hf = tiny.write_release(tmp_path / "hf", release, config)
    import_hf(hf, ORIGINAL / "vision_tower", [llava.FAMILY], tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", llava.FAMILY, tmp_path / "back")
    assert_same(loaded(tmp_path / "back"), release)
    with pytest.raises(CheckpointError, match="no projector of kind 'linear'"):
        export_hf(tmp_path / "checkpoint", llava.FAMILY, tmp_path / "native", "hf")
    assert not (tmp_path / "native").exists()


def test_a_translated_export_runs_in_transformers_and_computes_the_same(tmp_path):
    """From the authors' spelling into transformers' own class, against the outputs of the authors' code."""
    hf = tiny.write_release(tmp_path / "hf", original(), read_config(ORIGINAL))
    import_hf(hf, ORIGINAL / "vision_tower", [llava.FAMILY], tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", llava.FAMILY, tmp_path / "native", "hf")
    model, report = LlavaForConditionalGeneration.from_pretrained(tmp_path / "native", output_loading_info=True)
    assert not report["missing_keys"]
    case = np.load(ORIGINAL.parent / "cases" / "one_image.npz")
    with torch.no_grad():
        features = model.model.get_image_features(torch.from_numpy(case["pixel_values"])).pooler_output
        logits = model(inputs_embeds=torch.from_numpy(case["expanded_embeds"])).logits
    torch.testing.assert_close(torch.stack(list(features)), torch.from_numpy(case["visual_tokens"]), atol=1e-5, rtol=0)
    torch.testing.assert_close(logits, torch.from_numpy(case["logits"]), atol=2e-5, rtol=0)


def plain_parts(tmp_path, dtype=torch.bfloat16, **vision):
    """Directories of a plain Llama in .bin shards and a whole CLIPModel, cut out of the golden model."""
    whole = load_file(ORIGINAL / "model.safetensors")
    own = {k: v for k, v in whole.items() if not k.startswith(("model.vision", "model.mm_proj", "vm_head."))}
    llm = {name: tensor.to(dtype) for name, tensor in own.items()}
    config = {k: v for k, v in read_config(ORIGINAL).items() if not k.startswith(("mm_", "image_"))}
    names = sorted(llm)
    shards = [{name: llm[name] for name in names[k::2]} for k in range(2)]
    llm_dir = tiny.write_bin(tmp_path / "llm", shards, config | {"model_type": "llama"})
    (llm_dir / "tokenizer.json").write_text("llm")
    tower = load_file(ORIGINAL / "vision_tower" / "model.safetensors")
    tower |= {"logit_scale": torch.zeros(()), "text_model.embeddings.token_embedding.weight": torch.zeros(3, 3)}
    tower_config = {"model_type": "clip", "vision_config": {**read_config(ORIGINAL / "vision_tower"), **vision}}
    tower_dir = tiny.write_release(tmp_path / "tower", tower, tower_config)
    (tower_dir / "tokenizer.json").write_text("tower")
    (tower_dir / "preprocessor_config.json").write_text("tower")
    return llm_dir, tower_dir, llm, tower


def test_a_start_is_copied_and_drawn_whatever_the_layout(tmp_path):
    llm_dir, tower_dir, llm, tower = plain_parts(tmp_path)
    start = open_start(llm_dir, tower_dir, llava.FAMILY, seed=7)
    convert.write_checkpoint(start, tmp_path / "start", llm_dir, tower_dir)
    counts = {key: len(names) for key, names in start.origins().items()}
    assert counts == {("vision", "copied", str(tower_dir)): 41, ("projector", "drawn", ""): 4,
                      ("llm", "copied", str(llm_dir)): 21}  # fmt: skip
    stored = StoredTensors(tmp_path / "start")
    assert stored.infos.keys() == {entry.name for entry in start.table.entries()}
    drawn = stored.read("projector.linear_1.weight")
    assert torch.equal(drawn, draw("projector.linear_1.weight", (64, 32), 7).bfloat16()) and drawn.std() > 0.01
    assert not stored.read("projector.linear_1.bias").any()
    export_hf(tmp_path / "start", llava.FAMILY, tmp_path / "back", "original")
    back = loaded(tmp_path / "back")
    assert_same({name: back[name] for name in llm}, llm)
    prefix = "model.vision_tower.vision_tower."
    assert_same({k.removeprefix(prefix): v for k, v in back.items() if "vision_tower" in k},
                {k: v for k, v in tower.items() if k.startswith("vision_model.")})  # fmt: skip
    files = {path.name: path.read_text() for path in (tmp_path / "start" / directory.HF_FILES).iterdir()}
    assert files == {"tokenizer.json": "llm", "preprocessor_config.json": "tower"}


@pytest.mark.parametrize(
    "filename, wrapping", [("mm_projector.bin", ""), ("non_lora_trainables.bin", "base_model.model.")]
)
def test_a_start_takes_a_trained_projector(tmp_path, filename, wrapping):
    llm_dir, tower_dir, _, _ = plain_parts(tmp_path)
    projector = {k: v for k, v in load_file(ORIGINAL / "model.safetensors").items() if "mm_projector" in k}
    (tmp_path / "own").mkdir()
    torch.save({wrapping + name: tensor for name, tensor in projector.items()}, tmp_path / "own" / filename)
    start = open_start(llm_dir, tower_dir, llava.FAMILY, seed=0, hf_dir=tmp_path / "own")
    assert not start.drawn and start.info.dialect == "original"
    assert torch.equal(start.load("projector.linear_2.weight"), projector["model.mm_projector.2.weight"])
    assert ("projector", "copied", str(tmp_path / "own")) in start.origins()
    (tmp_path / "own" / "adapter_model.safetensors").write_text("")
    with pytest.raises(CheckpointError, match="adapter_model.safetensors is a LoRA adapter"):
        open_start(llm_dir, tower_dir, llava.FAMILY, seed=0, hf_dir=tmp_path / "own")


def test_a_start_that_would_draw_or_drop_what_it_should_not_is_refused(tmp_path):
    llm_dir, tower_dir, llm, _ = plain_parts(tmp_path)
    (tmp_path / "half").mkdir()
    torch.save({"model.mm_projector.0.weight": torch.zeros(64, 32)}, tmp_path / "half" / "mm_projector.bin")
    with pytest.raises(CheckpointError, match="missing: model.mm_projector.0.bias"):
        open_start(llm_dir, tower_dir, llava.FAMILY, seed=0, hf_dir=tmp_path / "half")
    shard = llm_dir / "pytorch_model-1-of-2.bin"
    content = torch.load(shard)
    torch.save(content | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}, shard)
    with pytest.raises(CheckpointError, match="holds model.layers.0.self_attn.q_proj.bias .1 such"):
        open_start(llm_dir, tower_dir, llava.FAMILY, seed=0)
    torch.save(dict(list(content.items())[1:]), shard)
    with pytest.raises(CheckpointError, match="missing: language_model.lm_head.weight"):
        open_start(llm_dir, tower_dir, llava.FAMILY, seed=0)


@settings(max_examples=12, deadline=None)
@given(
    groups=st.integers(1, 3),
    queries=st.integers(1, 3),
    vocab=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    num_shards=st.integers(1, 3),
    is_bin=st.booleans(),
    dialect=st.sampled_from(["plain", "nested"]),
)
def test_from_any_files_to_a_checkpoint_and_back_is_the_identity(
    groups, queries, vocab, dtype, num_shards, is_bin, dialect
):
    config = {"model_type": "tiny", "width": 4 * groups * queries, "vocab": vocab, "groups": groups, "queries": queries}
    release = tiny.tensors(config, dtype)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        if is_bin:
            names = sorted(release)
            hf = tiny.write_bin(path / "hf", [{n: release[n] for n in names[k::num_shards]} for k in range(num_shards)],
                                config)  # fmt: skip
        else:
            hf = tiny.write_release(path / "hf", release, config, 1000 // num_shards)
        import_hf(hf, None, [tiny.FAMILY], path / "first")
        export_hf(path / "first", tiny.FAMILY, path / "spelt", dialect)
        import_hf(path / "spelt", None, [tiny.FAMILY], path / "second")
        export_hf(path / "second", tiny.FAMILY, path / "back", "plain")
        assert_same(loaded(path / "back"), release)


def test_stored_tensors_are_global_padded_and_in_source_dtype(tmp_path):
    release = tiny.tensors(dtype=torch.float16)
    import_hf(tiny.write_release(tmp_path / "hf", release), None, [tiny.FAMILY], tmp_path / "checkpoint")
    stored = StoredTensors(tmp_path / "checkpoint")
    assert len(stored.infos) == 2 + 3 * tiny.LAYERS
    embedding = stored.read("llm.embed.weight")
    assert embedding.shape == (32, 16) and embedding.dtype == torch.float16
    assert torch.equal(embedding[:30], release["embed.weight"]) and not embedding[30:].any()


def test_slices_come_straight_from_a_release_and_go_back(tmp_path):
    release = tiny.tensors()
    checkpoint = open_hf(tiny.write_release(tmp_path / "hf", release), None, [tiny.FAMILY])
    back = {}
    for entry in checkpoint.table.entries():
        back |= entry.to_hf([checkpoint.load_slice(entry.name, rank, 2) for rank in range(2)])
    assert_same(back, {name: release[name] for name in checkpoint.table.hf_names})


def test_a_tower_fills_only_what_the_release_lacks(tmp_path):
    whole = load_file(GOLDEN / "model.safetensors")
    own = "vision_tower.vision_model.pre_layrnorm.bias"
    hf = tiny.write_release(
        tmp_path / "hf",
        {name: tensor for name, tensor in whole.items() if not name.startswith("vision_tower.") or name == own},
        read_config(GOLDEN),
    )
    tower = {name.removeprefix("vision_tower."): tensor for name, tensor in whole.items() if "vision_tower" in name}
    tower |= {"vision_model.pre_layrnorm.bias": torch.full((32,), 9.0), "text_model.x": torch.zeros(1)}
    tiny.write_release(tmp_path / "tower", tower, {"model_type": "clip", **read_config(GOLDEN)})
    with pytest.raises(CheckpointError, match="--tower"):
        import_hf(hf, None, [llava.FAMILY], tmp_path / "checkpoint")
    import_hf(hf, tmp_path / "tower", [llava.FAMILY], tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", llava.FAMILY, tmp_path / "back")
    assert_same(loaded(tmp_path / "back"), whole)


def test_tokenizer_and_processor_files_travel_and_nothing_else(tmp_path):
    hf = tiny.write_release(tmp_path / "hf", tiny.tensors())
    wanted = ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "merges.txt",
              "preprocessor_config.json", "chat_template.jinja", "generation_config.json"]  # fmt: skip
    for name in [*wanted, "tokenizer_code.py", "tokenizer.bin", "README.md", "training_args.bin"]:
        (hf / name).write_text(name)
    import_hf(hf, None, [tiny.FAMILY], tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tiny.FAMILY, tmp_path / "back")
    assert {path.name for path in (tmp_path / "back").iterdir()} == {*wanted, "config.json", "model.safetensors"}
    assert (tmp_path / "back" / "merges.txt").read_text() == "merges.txt"


def test_side_files_are_copied_along(tmp_path):
    hf = tiny.write_release(tmp_path / "hf", tiny.tensors())
    (hf / "tokenizer.json").write_text("{}")
    import_hf(hf, None, [tiny.FAMILY], tmp_path / "checkpoint")
    (tmp_path / "later").mkdir()
    directory.copy_side_files(tmp_path / "checkpoint", tmp_path / "later")
    assert_same(load_file(tmp_path / "later" / directory.KEPT), load_file(tmp_path / "checkpoint" / directory.KEPT))
    assert [path.name for path in (tmp_path / "later" / directory.HF_FILES).iterdir()] == ["tokenizer.json"]


def test_the_newest_step_of_a_run_is_found(tmp_path):
    hf = tiny.write_release(tmp_path / "hf", tiny.tensors())
    for step in (2, 10):
        import_hf(hf, None, [tiny.FAMILY], tmp_path / "run" / f"step_{step:08d}")
    (tmp_path / "run" / "step_00000020").mkdir()
    assert find_checkpoint(tmp_path / "run") == tmp_path / "run" / "step_00000010"
    assert find_checkpoint(tmp_path / "run" / "step_00000002").name == "step_00000002"
    with pytest.raises(CheckpointError, match="neither"):
        find_checkpoint(tmp_path)


def spoil_truncated(hf, release):
    path = hf / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def spoil_missing(hf, release):
    save_file({name: tensor for name, tensor in release.items() if name != "norm"}, hf / "model.safetensors")


def spoil_extra(hf, release):
    save_file(release | {"stranger": torch.zeros(1)}, hf / "model.safetensors")


def spoil_shape(hf, release):
    save_file(release | {"embed.weight": torch.zeros(29, 16)}, hf / "model.safetensors")


def spoil_lone_shape(hf, release):
    save_file(release | {"norm": torch.zeros(15)}, hf / "model.safetensors")


def spoil_dtype(hf, release):
    save_file(release | {"layers.1.up": release["layers.1.up"].half()}, hf / "model.safetensors")


def spoil_config(hf, release):
    (hf / "config.json").unlink()


@pytest.mark.parametrize(
    "spoil, message",
    [
        (spoil_truncated, "model.safetensors is no whole"),
        (spoil_missing, "missing: norm"),
        (spoil_extra, "not in its table: stranger"),
        (spoil_shape, r"embed.weight is \(29, 16\), not \(30, 16\)"),
        (spoil_lone_shape, r"norm is \(15,\), not \(16,\)"),
        (spoil_dtype, "layers.1.up torch.float16"),
        (spoil_config, "config.json is missing"),
    ],
)
def test_a_spoilt_release_is_refused_and_leaves_nothing(tmp_path, spoil, message):
    release = tiny.tensors()
    hf = tiny.write_release(tmp_path / "hf", release)
    spoil(hf, release)
    with pytest.raises(CheckpointError, match=message):
        import_hf(hf, None, [tiny.FAMILY], tmp_path / "out" / "checkpoint")
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def spoil_file(checkpoint):
    next(checkpoint.glob("*.distcp")).unlink()


def spoil_bytes(checkpoint):
    path = next(checkpoint.glob("*.distcp"))
    path.write_bytes(path.read_bytes()[:50])


def spoil_metadata(checkpoint):
    (checkpoint / ".metadata").write_bytes(b"")


class Payload:
    """Runs a command where it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch ran",)


def spoil_metadata_with_code(checkpoint):
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Payload()))


def spoil_shape_of_stored(checkpoint):
    path = checkpoint / "megamm.json"
    path.write_text(path.read_text().replace('"width": 16', '"width": 32'))


def spoil_info(checkpoint):
    (checkpoint / "megamm.json").unlink()


def spoil_version(checkpoint):
    info = json.loads((checkpoint / "megamm.json").read_text())
    (checkpoint / "megamm.json").write_text(json.dumps(info | {"format": 99}))


def spoil_fields(checkpoint):
    (checkpoint / "megamm.json").write_text('{"format": 1, "family": "tiny"}')


def spoil_names(checkpoint):
    other = {"llm.stranger": torch.zeros(1), "optimizer.state": torch.zeros(1)}
    stored = StoredTensors(checkpoint)
    other |= {name: stored.read(name) for name in stored.infos}
    torch_dist.save_torch_dist(checkpoint, {name: tensor.to("meta") for name, tensor in other.items()}, other.get)


def spoil_absent(checkpoint):
    stored = StoredTensors(checkpoint)
    other = {name: stored.read(name) for name in stored.infos if name != "llm.norm.weight"}
    torch_dist.save_torch_dist(checkpoint, {name: tensor.to("meta") for name, tensor in other.items()}, other.get)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (spoil_file, r"distcp.*not whole"),
        (spoil_bytes, r"distcp.*not whole"),
        (spoil_metadata, ".metadata cannot be read"),
        (spoil_metadata_with_code, r".metadata cannot be read \(it holds (posix|nt).system"),
        (spoil_shape_of_stored, r"llm.embed.weight is \(32, 16\), and its megamm.json makes it \(32, 32\)"),
        (spoil_info, "neither a megamm checkpoint"),
        (spoil_version, "format 99"),
        (spoil_fields, "megamm.json does not have the fields of a checkpoint: .*dialect"),
        (spoil_names, "llm.stranger"),
        (spoil_absent, "lacks llm.norm.weight"),
    ],
)
@pytest.mark.filterwarnings("ignore:Detected an existing checkpoint:UserWarning")
def test_a_spoilt_checkpoint_is_refused_and_leaves_nothing(tmp_path, spoil, message):
    hf = tiny.write_release(tmp_path / "hf", tiny.tensors())
    import_hf(hf, None, [tiny.FAMILY], tmp_path / "checkpoint")
    spoil(tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match=message):
        export_hf(tmp_path / "checkpoint", tiny.FAMILY, tmp_path / "out" / "back")
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())
    assert not Path("ran").exists()


def test_state_beside_the_model_is_no_part_of_an_export(tmp_path):
    release = tiny.tensors()
    checkpoint = open_hf(tiny.write_release(tmp_path / "hf", release), None, [tiny.FAMILY])
    saved = {entry.name: checkpoint.load(entry.name) for entry in checkpoint.table.entries()}
    saved |= {f"optimizer.exp_avg.{name}": torch.zeros_like(tensor) for name, tensor in saved.items()}
    import_hf(tmp_path / "hf", None, [tiny.FAMILY], tmp_path / "checkpoint")
    (tmp_path / "later").mkdir()
    metas = {name: tensor.to("meta") for name, tensor in saved.items()}
    torch_dist.save_torch_dist(tmp_path / "later", metas, saved.get)
    directory.write_info(tmp_path / "later", read_info(tmp_path / "checkpoint"))
    directory.copy_side_files(tmp_path / "checkpoint", tmp_path / "later")
    export_hf(tmp_path / "later", tiny.FAMILY, tmp_path / "back")
    assert_same(loaded(tmp_path / "back"), release)


def test_an_unknown_dialect_and_another_family_are_refused(tmp_path):
    import_hf(tiny.write_release(tmp_path / "hf", tiny.tensors()), None, [tiny.FAMILY], tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match="'neste'; it has plain, nested"):
        export_hf(tmp_path / "checkpoint", tiny.FAMILY, tmp_path / "back", "neste")
    with pytest.raises(CheckpointError, match="family tiny, not of llava"):
        export_hf(tmp_path / "checkpoint", llava.FAMILY, tmp_path / "back")


def test_the_family_is_found_only_where_one_fits(tmp_path):
    with pytest.raises(CheckpointError, match="(?s)- llava: .*model_type"):
        open_hf(tiny.write_release(tmp_path / "a", tiny.tensors() | {"x": torch.zeros(1)}), None,
                [llava.FAMILY, tiny.FAMILY])  # fmt: skip
    with pytest.raises(CheckpointError, match="tiny, tiny"):
        open_hf(tiny.write_release(tmp_path / "b", tiny.tensors()), None, [tiny.FAMILY, tiny.FAMILY])


MEASURE = """
import sys
from pathlib import Path
from tests.weights import tiny
from megamm.weights.convert import import_hf, export_hf

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

def extra_bytes(convert, *arguments):
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest resident size so far
    before = status("VmRSS")
    convert(*arguments)
    return status("VmHWM") - before

small, big, out = map(Path, sys.argv[1:])
import_hf(small, None, [tiny.FAMILY], out / "small")  # what the first call imports is not counted
export_hf(out / "small", tiny.FAMILY, out / "small_hf")
print(extra_bytes(import_hf, big, None, [tiny.FAMILY], out / "big"))
print(extra_bytes(export_hf, out / "big", tiny.FAMILY, out / "big_hf"))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is read from Linux's /proc")
@pytest.mark.parametrize("is_bin", [False, True], ids=["safetensors", "bin"])
def test_conversion_holds_at_most_twice_the_largest_tensor(tmp_path, is_bin):
    # The largest of ours is `fc1`: [4 w, w] float32, 10 MB of 60 MB.
    config = tiny.CONFIG | {"width": 800, "vocab": 3000}
    if is_bin:
        small = tiny.write_bin(tmp_path / "small", [tiny.tensors()])
        release = tiny.tensors(config)
        shards = [{name: release[name] for name in sorted(release)[k::3]} for k in range(3)]
        big = tiny.write_bin(tmp_path / "big", shards, config)
    else:
        small = tiny.write_release(tmp_path / "small", tiny.tensors())
        big = tiny.write_release(tmp_path / "big", tiny.tensors(config), config, max_shard_bytes=25_000_000)
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, small, big, tmp_path / "out"],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},  # glibc gives back at once what is freed
    )  # fmt: skip
    largest = 4 * (4 * 800 * 800)
    imported, exported = map(int, run.stdout.split())
    slack = 1_500_000  # the interpreter's own, and pages that the file system reads ahead
    assert largest / 2 < imported < 2 * largest + slack
    assert largest / 2 < exported < 2 * largest + slack
