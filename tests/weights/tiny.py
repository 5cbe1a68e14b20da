"""A family of one small table in two dialects, and random Hugging Face directories of it."""

from pathlib import Path

import torch
from torch import Tensor

from megamm.errors import CheckpointError
from megamm.models.family import Family
from megamm.weights.hf import HfWriter, TensorInfo, write_json
from megamm.weights.keymap import Dims, Keep, KeyMap, Row

CONFIG = {"model_type": "tiny", "width": 16, "vocab": 30, "torch_dtype": "float32"}
LAYERS = 3


def table(config: dict) -> KeyMap:
    """Rows of every packing and cut; one more layer is stored than computed with."""
    width, padded = config["width"], -(-config["vocab"] // 32) * 32
    key_width = width // config.get("queries", 2)
    qkv = tuple(f"layers.{{i}}.{x}" for x in "qkv")
    rows = [
        Row("llm.embed.weight", ("embed.weight",), (padded, width), tp="vocab"),
        Row("llm.layers.{i}.qkv.weight", qkv, (width + 2 * key_width, width), pack="qkv", tp="col"),
        Row("llm.layers.{i}.fc1.weight", ("layers.{i}.gate", "layers.{i}.up"), (4 * width, width), "cat2", "col2"),
        Row("llm.layers.{i}.fc2.weight", ("layers.{i}.down",), (width, 2 * width), tp="row"),
        Row("llm.norm.weight", ("norm",), (width,)),
        Keep("layers.{i}.down"),
        Keep("layers.{i}.inv_freq"),
    ]
    groups = config.get("groups", 2)
    heads = groups * config.get("queries", 2)
    dims = Dims(layers=LAYERS, heads=heads, groups=groups, vocab=config["vocab"], vocab_padded=padded)
    return KeyMap(rows, dims)


def read(config: dict, tower_config: dict | None = None) -> dict:
    """The options of this family are its configuration."""
    if config.get("model_type") not in ("tiny", "nested"):
        raise CheckpointError(f"config.json: model_type {config.get('model_type')!r} is not tiny")
    return config


FAMILY = Family(
    name="tiny",
    read=read,
    write=lambda options, dialect: ({**options, "model_type": "nested" if dialect == "nested" else "tiny"}, None),
    compose=lambda llm_config, tower_config: llm_config,
    keys={
        "plain": table,
        "nested": lambda config: table(config).renamed(hf={"": "model."}),
    },
    export_dialect="plain",
    template="plain",
)


def tensors(config: dict = CONFIG, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """Every tensor of a release in dialect `plain`, kept ones included."""
    width, generator = config["width"], torch.Generator().manual_seed(seed)
    shapes = {"embed.weight": (config["vocab"], width), "norm": (width,)}
    key_width = width // config.get("queries", 2)
    for i in range(LAYERS):
        shapes |= {f"layers.{i}.q": (width, width), f"layers.{i}.k": (key_width, width)}
        shapes |= {f"layers.{i}.v": (key_width, width), f"layers.{i}.down": (width, 2 * width)}
        shapes |= {f"layers.{i}.gate": (2 * width, width), f"layers.{i}.up": (2 * width, width)}
    shapes |= {f"layers.{LAYERS}.down": (width, 2 * width)}
    drawn = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return drawn | {"layers.0.inv_freq": torch.arange(4, dtype=torch.float32)}


def write_bin(directory: Path, shards: list[dict[str, Tensor]], config: dict = CONFIG, index: bool = False) -> Path:
    """Write a Hugging Face directory of PyTorch files: one, or shards with or without an index."""
    directory.mkdir()
    names = [f"pytorch_model-{number}-of-{len(shards)}.bin" for number in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else ["pytorch_model.bin"]
    for name, shard in zip(names, shards, strict=True):
        torch.save(shard, directory / name)
    if index:
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        write_json(directory / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": weight_map})
    write_json(directory / "config.json", config)
    return directory


def write_release(
    directory: Path, release: dict[str, Tensor], config: dict = CONFIG, max_shard_bytes: int | None = None
) -> Path:
    """Write a Hugging Face directory."""
    directory.mkdir()
    infos = {name: TensorInfo.of(tensor) for name, tensor in release.items()}
    with HfWriter(directory, infos, max_shard_bytes=max_shard_bytes) as writer:
        for name, tensor in release.items():
            writer.write(name, tensor)
    write_json(directory / "config.json", config)
    return directory
