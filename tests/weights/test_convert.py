"""HF -> megamm -> HF gives back every bit; what does not fit is refused and leaves nothing; memory stays bounded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megamm.errors import CheckpointError
from megamm.models import llava
from megamm.weights import convert
from megamm.weights.convert import StoredTensors, export_hf, find_checkpoint, import_hf, open_hf, read_info
from megamm.weights.hf import HfSource, read_config
from tests.weights import tiny

GOLDEN = Path(__file__).parents[1] / "golden" / "llava" / "hf_native" / "hf"


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
    kept = HfSource.of_file(tmp_path / "checkpoint" / convert.KEPT).infos
    assert len(kept) == 18 and all("layers.3." in name or "post_layernorm" in name for name in kept)


@pytest.mark.parametrize("dialect", llava.FAMILY.keys)
def test_llava_is_imported_from_every_dialect_it_is_exported_in(tmp_path, dialect):
    import_hf(GOLDEN, None, [llava.FAMILY], tmp_path / "first")
    export_hf(tmp_path / "first", llava.FAMILY, tmp_path / "spelt", dialect)
    assert import_hf(tmp_path / "spelt", None, [llava.FAMILY], tmp_path / "second").dialect == dialect
    export_hf(tmp_path / "second", llava.FAMILY, tmp_path / "back", "hf")
    assert_same(loaded(tmp_path / "back"), load_file(GOLDEN / "model.safetensors"))


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
    tiny.write_release(tmp_path / "tower", tower)
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
    convert.copy_side_files(tmp_path / "checkpoint", tmp_path / "later")
    assert_same(
        load_file(tmp_path / "later" / convert.KEPT), load_file(tmp_path / "checkpoint" / convert.KEPT)
    )
    assert [path.name for path in (tmp_path / "later" / convert.HF_FILES).iterdir()] == ["tokenizer.json"]


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
        (spoil_shape, r"embed.weight \(29, 16\)"),
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


def spoil_info(checkpoint):
    (checkpoint / "megamm.json").unlink()


def spoil_version(checkpoint):
    info = json.loads((checkpoint / "megamm.json").read_text())
    (checkpoint / "megamm.json").write_text(json.dumps(info | {"format": 99}))


def spoil_names(checkpoint):
    other = {"llm.stranger": torch.zeros(1), "optimizer.state": torch.zeros(1)}
    stored = StoredTensors(checkpoint)
    other |= {name: stored.read(name) for name in stored.infos}
    convert.save_torch_dist(checkpoint, {name: tensor.to("meta") for name, tensor in other.items()}, other.get)


def spoil_absent(checkpoint):
    stored = StoredTensors(checkpoint)
    other = {name: stored.read(name) for name in stored.infos if name != "llm.norm.weight"}
    convert.save_torch_dist(checkpoint, {name: tensor.to("meta") for name, tensor in other.items()}, other.get)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (spoil_file, r"distcp.*not whole"),
        (spoil_bytes, r"distcp.*not whole"),
        (spoil_metadata, ".metadata cannot be read"),
        (spoil_info, "neither a megamm checkpoint"),
        (spoil_version, "format 99"),
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


def test_state_beside_the_model_is_no_part_of_an_export(tmp_path):
    release = tiny.tensors()
    checkpoint = open_hf(tiny.write_release(tmp_path / "hf", release), None, [tiny.FAMILY])
    saved = {entry.name: checkpoint.load(entry.name) for entry in checkpoint.table.entries()}
    saved |= {f"optimizer.exp_avg.{name}": torch.zeros_like(tensor) for name, tensor in saved.items()}
    import_hf(tmp_path / "hf", None, [tiny.FAMILY], tmp_path / "checkpoint")
    (tmp_path / "later").mkdir()
    convert.save_torch_dist(tmp_path / "later", {name: tensor.to("meta") for name, tensor in saved.items()}, saved.get)
    convert.write_info(tmp_path / "later", read_info(tmp_path / "checkpoint"))
    convert.copy_side_files(tmp_path / "checkpoint", tmp_path / "later")
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
def test_conversion_holds_at_most_twice_the_largest_tensor(tmp_path):
    # The largest of ours is `fc1`: [4 w, w] float32, 10 MB of 60 MB.
    config = tiny.CONFIG | {"width": 800, "vocab": 3000}
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
