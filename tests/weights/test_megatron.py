"""Imported checkpoints against megatron-core itself: it loads them at every layout, and what it saves is exported."""

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_config import TransformerConfig

from megamm import backend
from megamm.config.schema import Parallel
from megamm.models.family import Family
from megamm.models.llm import llama
from megamm.models.options import LlmOptions
from megamm.parallel import groups
from megamm.parallel.placement import Layout, Unit
from megamm.weights import convert, directory
from megamm.weights.hf import HfSource
from tests.weights.tiny import write_release

OPTIONS = LlmOptions(
    num_layers=3, hidden_size=32, ffn_size=48, num_heads=4, num_groups=2, head_dim=8, vocab_size=125,
    max_positions=64, norm="RMSNorm", norm_eps=1e-5, rope_theta=1e4,
)  # fmt: skip
FAMILY = Family(
    name="plain_llama",
    read=lambda config, tower_config: OPTIONS,
    write=lambda options, dialect: ({}, None),
    compose=lambda llm_config, tower_config: {},
    keys={"hf": lambda options: llama.keys(options).renamed(ours="llm.")},
    export_dialect="hf",
    template="plain",
)


def release(dtype):
    generator = torch.Generator().manual_seed(1)
    h, f, kv, vocab = 32, 48, 16, 125
    shapes = {"model.embed_tokens.weight": (vocab, h), "model.norm.weight": (h,), "lm_head.weight": (vocab, h)}
    for i in range(OPTIONS.num_layers):
        attention, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        shapes |= {f"{attention}{x}_proj.weight": (size, h) for x, size in (("q", h), ("k", kv), ("v", kv), ("o", h))}
        shapes |= {f"{mlp}gate_proj.weight": (f, h), f"{mlp}up_proj.weight": (f, h), f"{mlp}down_proj.weight": (h, f)}
        shapes |= {f"model.layers.{i}.{x}_layernorm.weight": (h,) for x in ("input", "post_attention")}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def sharded_state(model):
    """megatron's description of the local parameters; the `_extra_state` of its layers is nothing outside FP8."""
    state = model.sharded_state_dict(prefix="llm.")
    return {name: value for name, value in state.items() if not isinstance(value, ShardedObject)}


def load_and_save(hf, checkpoint, saved, tp):
    """On each rank: load at this layout, compare with slices cut straight from the release, let megatron save."""
    backend.start("cpu")
    groups.start_distributed()
    layout = Layout((tuple(Unit(name, 1.0, 1, 1) for name in ("llm.embed", "llm.layer.0", "llm.head")),), 1)
    ranks = groups.start(Parallel(tp=tp), layout)
    config = TransformerConfig(
        num_layers=OPTIONS.num_layers, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2,
        kv_channels=8, tensor_model_parallel_size=tp, normalization="RMSNorm", gated_linear_unit=True,
        activation_func=torch.nn.functional.silu, add_bias_linear=False, use_cpu_initialization=True,
        hetereogenous_dist_checkpoint=True,
    )  # fmt: skip
    llm = GPTModel(
        config, get_gpt_layer_local_spec(normalization="RMSNorm"), vocab_size=OPTIONS.padded_vocab_size,
        max_sequence_length=64, position_embedding_type="rope", share_embeddings_and_output_weights=False,
    )  # fmt: skip
    state = sharded_state(llm)
    canonical = {name.removeprefix("llm."): value.key for name, value in state.items()}
    loaded = dist_checkpointing.load(state, str(checkpoint))
    llm.load_state_dict({name.removeprefix("llm."): tensor for name, tensor in loaded.items()})

    source = convert.open_hf(hf, None, [FAMILY])
    parameters = dict(llm.named_parameters())
    assert {canonical[name] for name in parameters} == {entry.name for entry in source.table.entries()}
    for name, parameter in parameters.items():
        entry = source.table[canonical[name]]
        dim = parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None
        assert entry.partition_dim == dim, name
        assert torch.equal(parameter, source.load_slice(entry.name, ranks.tp_rank, tp).float()), name

    if ranks.rank == 0:
        saved.mkdir()
    dist.barrier()
    dist_checkpointing.save(sharded_state(llm), str(saved))
    dist.barrier()


@pytest.mark.slow
def test_megatron_loads_what_is_imported_and_what_it_saves_is_exported(tmp_path, pool):
    tensors = release(torch.bfloat16)
    hf = write_release(tmp_path / "hf", tensors, {})
    info = convert.import_hf(hf, None, [FAMILY], tmp_path / "checkpoint")
    for tp in (1, 2, 4):  # 4 is more than there are key/value groups
        saved = tmp_path / f"saved{tp}"
        pool.run(load_and_save, hf, tmp_path / "checkpoint", saved, tp, ranks=tp)
        directory.write_info(saved, info)
        directory.copy_side_files(tmp_path / "checkpoint", saved)
        convert.export_hf(saved, FAMILY, tmp_path / f"back{tp}")
        source = HfSource(tmp_path / f"back{tp}")
        assert source.infos.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(source.read(name), tensor.float()), (tp, name)
