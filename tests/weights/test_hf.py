"""Hugging Face directories: what is written is what is read, and what is broken is refused by name."""

import json
import os
import pickle
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from megamm.errors import CheckpointError
from megamm.weights.hf import DTYPES, HfSource, HfWriter, TensorInfo, new_directory, read_config
from tests.weights import tiny


def tensors_of_every_dtype():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randint(0, 2, (3, 5), generator=generator).to(dtype) for name, dtype in DTYPES.items()} | {
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 4),
        "transposed": torch.randn(3, 2).t(),
    }


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tolist() == b.tolist()


def write(directory, tensors, order=None, **options):
    infos = {name: TensorInfo.of(tensor) for name, tensor in tensors.items()}
    with HfWriter(directory, infos, **options) as writer:
        for name in order or tensors:
            writer.write(name, tensors[name])


@pytest.mark.parametrize("max_shard_bytes", [None, 100])
def test_what_is_written_is_what_safetensors_reads(tmp_path, max_shard_bytes):
    tensors = tensors_of_every_dtype()
    write(tmp_path, tensors, order=sorted(tensors, reverse=True), max_shard_bytes=max_shard_bytes)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (max_shard_bytes is not None)
    theirs = {name: tensor for file in files for name, tensor in load_file(file).items()}
    source = HfSource(tmp_path)
    assert theirs.keys() == source.infos.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert same_bits(theirs[name], tensor) and same_bits(source.read(name), tensor)
        assert source.infos[name] == TensorInfo.of(tensor)


def test_shards_are_named_and_indexed_as_transformers_does(tmp_path):
    write(tmp_path, {"a": torch.zeros(10), "b": torch.zeros(10), "c": torch.zeros(1)}, max_shard_bytes=44)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index == {
        "metadata": {"total_size": 84},
        "weight_map": {
            "a": "model-00001-of-00002.safetensors",
            "b": "model-00002-of-00002.safetensors",
            "c": "model-00002-of-00002.safetensors",
        },
    }


def test_what_safetensors_writes_is_what_is_read(tmp_path):
    tensors = {name: tensor.contiguous() for name, tensor in tensors_of_every_dtype().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    source = HfSource(tmp_path)
    assert all(same_bits(source.read(name), tensor) for name, tensor in tensors.items())


def test_the_writer_refuses_what_was_not_announced(tmp_path):
    with pytest.raises(ValueError, match="never written: b"):
        write(tmp_path, {"a": torch.zeros(2), "b": torch.zeros(2)}, order=["a"])
    with HfWriter(tmp_path, {"a": TensorInfo((2,), torch.float32)}) as writer:
        with pytest.raises(ValueError, match="announced"):
            writer.write("b", torch.zeros(2))
        with pytest.raises(ValueError, match="announced"):
            writer.write("a", torch.zeros(2, dtype=torch.bfloat16))
        writer.write("a", torch.zeros(2))
        with pytest.raises(ValueError, match="twice"):
            writer.write("a", torch.zeros(2))


def lie(header, data=b"\0" * 16):
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


def entry(begin, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 64,
        struct.pack("<Q", 10**12) + b"\0" * 64,
        lie({"a": entry(0, 8), "b": entry(16, 24)}),
        lie({"a": entry(0, 8), "b": entry(4, 12)}),
        lie({"a": entry(0, 16, shape=(3,))}),
        lie({"a": entry(0, 32, shape=(8,))}),
        lie({"a": entry(0, 16, shape=(4,), dtype="F99")}),
        lie({"a": entry(0, 16, shape=(2,), dtype="C64")}),
    ],
    ids=["empty", "garbage", "huge-header", "hole", "overlap", "shape", "past-the-end", "dtype", "complex"],
)
def test_a_lying_file_is_refused_by_name(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="model.safetensors"):
        HfSource(tmp_path)


def test_a_truncated_file_is_refused_by_name(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="model.safetensors is no whole safetensors file"):
        HfSource(tmp_path)


def sharded(directory, weight_map, **files):
    for stem, tensors in files.items():
        save_file({name: torch.zeros(2) for name in tensors}, directory / f"{stem}.safetensors")
    index = {"metadata": {}, "weight_map": {name: f"{stem}.safetensors" for name, stem in weight_map.items()}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "weight_map, files, message",
    [
        ({"a": "one", "b": "two"}, {"one": "a"}, "two.safetensors is missing"),
        ({"a": "one", "b": "one"}, {"one": "a"}, "one.safetensors lacks b"),
        ({"a": "one", "b": "two"}, {"one": "a", "two": "ab"}, "a is both in"),
        ({"a": "one"}, {"one": "ab"}, "one.safetensors holds b"),
        ({"a": "../one"}, {"one": "a"}, "not the name of a file beside it"),
        ({}, {"one": "a"}, "has no weight_map"),
    ],
)
def test_files_that_contradict_their_index_are_refused(tmp_path, weight_map, files, message):
    sharded(tmp_path, weight_map, **files)
    with pytest.raises(CheckpointError, match=message):
        HfSource(tmp_path)


@pytest.mark.parametrize("num_shards, index", [(1, False), (1, True), (3, False), (3, True)])
def test_pytorch_files_are_read_whole_and_sharded(tmp_path, num_shards, index):
    tensors = tensors_of_every_dtype() | {"parameter": torch.nn.Parameter(torch.ones(2))}
    names = sorted(tensors)
    shards = [{name: tensors[name] for name in names[k::num_shards]} for k in range(num_shards)]
    directory = tiny.write_bin(tmp_path / "hf", shards, index=index)
    if num_shards == 1 and index:
        with pytest.raises(CheckpointError, match="holds both pytorch_model.bin and pytorch_model.bin.index.json"):
            HfSource(directory)
        return
    source = HfSource(directory)
    assert source.infos.keys() == tensors.keys()
    for name, tensor in tensors.items():
        read = source.read(name)
        assert same_bits(read, tensor) and not read.requires_grad
        assert source.infos[name] == TensorInfo.of(tensor)


def test_what_llavas_trainer_writes_alone_is_read_under_its_plain_names(tmp_path):
    torch.save({"model.mm_projector.0.weight": torch.ones(2)}, tmp_path / "mm_projector.bin")
    tuned = {"base_model.model.model.mm_projector.2.weight": torch.ones(3),
             "base_model.model.lm_head.weight": torch.ones(4),
             "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight": torch.ones(5)}  # fmt: skip
    torch.save(tuned, tmp_path / "non_lora_trainables.bin")
    source = HfSource(tmp_path)
    assert {name: source.read(name).numel() for name in source.infos} == {
        "model.mm_projector.0.weight": 2, "model.mm_projector.2.weight": 3, "lm_head.weight": 4,
        "model.layers.0.self_attn.q_proj.weight": 5,
    }  # fmt: skip


@pytest.mark.parametrize("second", ["mm_projector.bin", "model.safetensors", "pytorch_model.bin"])
def test_one_name_in_two_files_is_refused(tmp_path, second):
    torch.save({"base_model.model.model.a": torch.ones(2)}, tmp_path / "non_lora_trainables.bin")
    save = save_file if second.endswith(".safetensors") else torch.save
    save({"model.a": torch.ones(2)}, tmp_path / second)
    with pytest.raises(CheckpointError, match=rf"model.a is both in (?=.*{second}).*non_lora_trainables.bin"):
        HfSource(tmp_path)


class Payload:
    """Runs a command where it is unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize("is_archive", [True, False])
def test_a_hostile_payload_is_refused_and_never_runs(tmp_path, is_archive):
    trace, path = tmp_path / "ran", tmp_path / "pytorch_model.bin"
    content = {"a": torch.ones(2), "b": Payload(trace)}
    if is_archive:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin is (refused: it holds more than tensors|no whole)"):
        HfSource(tmp_path)
    assert not trace.exists()
    torch.load(path, weights_only=False) if is_archive else pickle.loads(path.read_bytes())  # noqa: S301
    assert trace.exists(), "the payload is none, and the test proves nothing"


@pytest.mark.parametrize(
    "content, message",
    [
        ([torch.ones(1)], "holds a list"),
        ({"state_dict": {"a": torch.ones(1)}}, "'state_dict', a dict, where only tensors belong"),
        ({"a": 3.0}, "'a', a float"),
        ({3: torch.ones(1)}, "holds 3"),
        ({"a": torch.ones(1).to_sparse()}, "a is torch.sparse_coo"),
        ({"a": torch.ones(1, dtype=torch.complex64)}, "of torch.complex64"),
        ({"a": torch.ones(1).expand(1000, 1000)}, r"a \(1000, 1000\) is larger than the data"),
    ],
    ids=["list", "nested", "number", "key", "sparse", "complex", "expanded"],
)
def test_a_pytorch_file_that_holds_anything_but_tensors_by_name_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=f"pytorch_model.bin.*{message}"):
        HfSource(tmp_path)


@pytest.mark.parametrize("damage", ["empty", "garbage", "truncated", "legacy"])
def test_a_broken_pytorch_file_is_refused_by_name(tmp_path, damage):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(100)}, path, _use_new_zipfile_serialization=damage != "legacy")
    content = {"empty": b"", "garbage": b"garbage" * 100, "truncated": path.read_bytes()[:-50]}
    path.write_bytes(content.get(damage, path.read_bytes()))
    with pytest.raises(CheckpointError, match="pytorch_model.bin is no whole PyTorch file"):
        HfSource(tmp_path)


def test_a_missing_shard_is_seen_without_an_index(tmp_path):
    directory = tiny.write_bin(tmp_path / "hf", [{"a": torch.ones(1)}, {"b": torch.ones(1)}, {"c": torch.ones(1)}])
    (directory / "pytorch_model-2-of-3.bin").unlink()
    with pytest.raises(CheckpointError, match="holds 2 shards like pytorch_model-1-of-3.bin"):
        HfSource(directory)


def test_a_directory_without_or_with_two_sets_of_weights_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no weights"):
        HfSource(tmp_path)
    with pytest.raises(CheckpointError, match="not a directory"):
        HfSource(tmp_path / "absent")
    sharded(tmp_path, {"a": "model"}, model="a")
    with pytest.raises(CheckpointError, match="both"):
        HfSource(tmp_path)


@pytest.mark.parametrize(
    "text, message", [(None, "missing; give the dir"), ("{", "not JSON"), ("[]", "not a JSON object")]
)
def test_a_broken_config_is_refused_by_name(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"config.json.*{message}"):
        read_config(tmp_path)


def test_a_new_directory_is_there_whole_or_not_at_all(tmp_path):
    target = tmp_path / "runs" / "out"
    with pytest.raises(RuntimeError), new_directory(target) as directory:
        (directory / "half").write_text("x")
        raise RuntimeError
    assert list(target.parent.iterdir()) == []
    with new_directory(target) as directory:
        (directory / "whole").write_text("x")
        assert not target.exists()
    assert [path.name for path in target.parent.iterdir()] == ["out"]
    assert (target / "whole").read_text() == "x"
    with pytest.raises(CheckpointError, match="exists already"), new_directory(target):
        pass
    assert (target / "whole").read_text() == "x"
