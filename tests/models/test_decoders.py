"""Every decoder against transformers' own class: configuration, key names, logits, gradients, tensor parallel too."""

import copy
import json
import math
from typing import Any

import pytest
import torch
import transformers

from megamm import backend
from megamm.config.schema import Parallel
from megamm.errors import CheckpointError
from megamm.models.llm import llama, mistral, phi2, phi3, qwen2, stablelm2
from megamm.models.llm.decoder import Decoder
from megamm.models.spec import Build, llm_config
from megamm.parallel import groups
from megamm.parallel.groups import gather_over_tp
from megamm.parallel.placement import Layout, Unit

SIZES: dict[str, Any] = dict(
    vocab_size=125, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64, pad_token_id=None, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
TWO = dict(num_key_value_heads=2)
CASES: dict[str, tuple[Any, type, dict[str, Any]]] = {
    "llama": (llama, transformers.LlamaConfig, TWO),
    "mistral": (mistral, transformers.MistralConfig, {**TWO, "sliding_window": 5}),
    "mistral without a window": (mistral, transformers.MistralConfig, {**TWO, "sliding_window": None, "head_dim": 24}),
    "qwen2": (qwen2, transformers.Qwen2Config, {**TWO, "rope_theta": 1e6}),
    "qwen2 tied": (qwen2, transformers.Qwen2Config, {**TWO, "tie_word_embeddings": True}),
    "phi2": (phi2, transformers.PhiConfig, dict(partial_rotary_factor=0.4, hidden_act="gelu_new")),
    "phi3": (phi3, transformers.Phi3Config, {**TWO, "sliding_window": 7}),
    "stablelm2": (stablelm2, transformers.StableLmConfig, {**TWO, "use_qkv_bias": True, "partial_rotary_factor": 0.25}),
}
LENGTH = 16


def make(case: str) -> transformers.PreTrainedModel:
    """A random model of transformers, biases and norms moved away from where they say nothing."""
    _, config_class, more = CASES[case]
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(
        config_class(**{**SIZES, **more}, attn_implementation="eager"), dtype=torch.float32
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def state(model: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
    """Its tensors as save_pretrained writes them."""
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def config_of(model: transformers.PreTrainedModel) -> dict[str, Any]:
    return json.loads(model.config.to_json_string())


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return tuple(torch.randint(0, SIZES["vocab_size"], (2, LENGTH), generator=generator) for _ in range(2))


def run(case: str, tp: int, sequence_parallel: bool, config: dict, tensors: dict[str, torch.Tensor]):
    """Logits [B, S, V] and the whole gradient of the summed loss by Hugging Face name, of this rank."""
    backend.start("cpu")
    part = CASES[case][0]
    options = part.from_hf(config)
    table = part.keys(options)
    names = ["llm.embed", *(f"llm.layer.{i}" for i in range(options.num_layers)), "llm.head"]
    layout = Layout((tuple(Unit(name, 1.0, 1, 1) for name in names),), 1)
    groups.start_distributed()
    ranks = groups.start(Parallel(tp=tp), layout)
    build = Build(tp=tp, sequence_parallel=sequence_parallel, layout=layout)
    decoder = Decoder(options, llm_config(options, build), layout.stage(0, 0))
    sharded = decoder.sharded_state_dict()
    parameters = {sharded[name].key: parameter for name, parameter in decoder.named_parameters()}
    assert parameters.keys() == {entry.name for entry in table.entries()}
    with torch.no_grad():
        for name, parameter in parameters.items():
            entry = table[name]
            parameter.copy_(entry.slice(entry.pack([tensors[key] for key in entry.hf]), ranks.tp_rank, tp))
    ids, labels = inputs()
    positions = torch.arange(LENGTH).expand_as(ids)
    x = decoder.embedding(input_ids=ids, position_ids=positions)
    if sequence_parallel:
        x = groups_scatter(x)
    logits_BSV = decoder(input_ids=None, position_ids=None, attention_mask=None, decoder_input=x, labels=None)
    x = decoder.embedding(input_ids=ids, position_ids=positions)
    if sequence_parallel:
        x = groups_scatter(x)
    decoder(input_ids=None, position_ids=None, attention_mask=None, decoder_input=x, labels=labels).sum().backward()
    gradients = {}
    for name, parameter in parameters.items():
        entry, grad = table[name], parameter.grad
        if getattr(parameter, "sequence_parallel", False):
            grad = torch.stack(gather_over_tp(grad)).sum(0)
        gradients |= entry.to_hf(gather_over_tp(grad) if entry.partition_dim is not None else [grad])
    whole = torch.cat(gather_over_tp(logits_BSV.detach()), dim=-1)
    return whole, gradients


def groups_scatter(x: torch.Tensor) -> torch.Tensor:
    """Sequence parallelism's cut, as the model makes it behind the embedding."""
    from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region

    return scatter_to_sequence_parallel_region(x)


LAYOUTS = [(1, False), (2, False), (2, True), (4, True)]


@pytest.mark.parametrize(("tp", "sequence_parallel"), LAYOUTS, ids=lambda x: str(x))
@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_transformers(case, tp, sequence_parallel, pool):
    """At tp=4 most have fewer key/value groups than ranks."""
    model = make(case)
    ids, labels = inputs()
    logits = model(input_ids=ids).logits
    torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="sum").backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    for whole, gradients in pool.run(run, case, tp, sequence_parallel, config_of(model), state(model), ranks=tp):
        vocab = SIZES["vocab_size"]
        assert (whole[..., :vocab] - logits).abs().max() < 1e-5
        assert torch.isneginf(whole[..., vocab:]).all() and whole.size(-1) == 128
        assert gradients.keys() == expected.keys()
        for name, grad in gradients.items():
            assert torch.isfinite(grad).all()
            worst = (grad - expected[name]).abs().max() / (expected[name].norm() + 1e-3)
            assert worst < 1e-5, name


PUBLISHED: dict[str, tuple[Any, int, dict[str, Any]]] = {
    "Mistral-7B-Instruct-v0.2": (mistral, 7_241_732_096, dict(
        model_type="mistral", hidden_act="silu", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        max_position_embeddings=32768, num_attention_heads=32, num_key_value_heads=8, rms_norm_eps=1e-5,
        rope_theta=1000000.0, sliding_window=None, tie_word_embeddings=False, vocab_size=32000,
    )),
    "Mistral-7B-v0.1": (mistral, 7_241_732_096, dict(
        model_type="mistral", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, head_dim=None,
        max_position_embeddings=32768, num_attention_heads=32, rms_norm_eps=1e-5, sliding_window=4096,
    )),
    "Qwen2-0.5B": (qwen2, 494_032_768, dict(
        model_type="qwen2", hidden_act="silu", hidden_size=896, intermediate_size=4864, max_window_layers=24,
        max_position_embeddings=131072, num_attention_heads=14, num_hidden_layers=24, num_key_value_heads=2,
        rms_norm_eps=1e-6, rope_theta=1000000.0, sliding_window=131072, tie_word_embeddings=True,
        use_sliding_window=False, vocab_size=151936,
    )),
    "phi-2": (phi2, 2_779_683_840, dict(
        model_type="phi", hidden_act="gelu_new", hidden_size=2560, intermediate_size=10240, layer_norm_eps=1e-5,
        max_position_embeddings=2048, num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=32,
        partial_rotary_factor=0.4, qk_layernorm=False, resid_pdrop=0.1, rope_scaling=None, rope_theta=10000.0,
        tie_word_embeddings=False, vocab_size=51200,
    )),
    "Phi-3-mini-4k-instruct": (phi3, 3_821_079_552, dict(
        model_type="phi3", attention_bias=False, hidden_act="silu", hidden_size=3072, intermediate_size=8192,
        max_position_embeddings=4096, num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=32,
        rms_norm_eps=1e-5, rope_scaling=None, rope_theta=10000.0, sliding_window=2047, vocab_size=32064,
    )),
    "stablelm-2-zephyr-1_6b": (stablelm2, 1_644_515_328, dict(
        model_type="stablelm", hidden_act="silu", hidden_size=2048, intermediate_size=5632, layer_norm_eps=1e-5,
        max_position_embeddings=4096, num_attention_heads=32, num_hidden_layers=24, num_key_value_heads=32,
        partial_rotary_factor=0.25, rope_theta=10000, use_qkv_bias=True, vocab_size=100352, qk_layernorm=False,
    )),
    "stablelm-2-zephyr-1_6b, older names": (stablelm2, 1_644_515_328, dict(
        model_type="stablelm", hidden_act="silu", hidden_size=2048, intermediate_size=5632, norm_eps=1e-5,
        max_position_embeddings=4096, num_attention_heads=32, num_hidden_layers=24, num_key_value_heads=32,
        rope_pct=0.25, rope_theta=10000, use_qkv_bias=True, vocab_size=100352,
    )),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations(name):
    """Written as they were read, also by transformers' newest fields; and the table has the published size."""
    part, parameters, config = PUBLISHED[name]
    options = part.from_hf(config)
    before = copy.deepcopy(config)
    assert part.to_hf(options, config) == before == config
    table = part.keys(options)
    assert sum(math.prod(shape) for entry in table.entries() for shape in entry.hf_shapes) == parameters
    assert part.from_hf(part.to_hf(options, {})) == options
    resaved = json.loads(transformers.AutoConfig.for_model(**config).to_json_string())
    assert "rope_parameters" in resaved and part.to_hf(part.from_hf(resaved), resaved) == resaved
    if "older names" not in name:
        assert part.from_hf(resaved) == options


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("Qwen2-0.5B", dict(use_sliding_window=True), "qwen2 with use_sliding_window True"),
        ("phi-2", dict(qk_layernorm=True), "phi with qk_layernorm True"),
        ("stablelm-2-zephyr-1_6b", dict(use_parallel_residual=True), "use_parallel_residual True"),
        ("Phi-3-mini-4k-instruct", dict(rope_scaling={"type": "longrope"}), "rotary scaling 'longrope'"),
        ("Mistral-7B-v0.1", dict(hidden_act="gelu"), "mistral with hidden_act 'gelu' is not supported, only 'silu'"),
        ("Mistral-7B-v0.1", dict(num_key_value_heads=5), "32 num_attention_heads cannot share 5 num_key_value_heads"),
    ],
)
def test_what_a_decoder_cannot_be_is_refused(name, change, message):
    part, _, config = PUBLISHED[name]
    with pytest.raises(CheckpointError, match=message):
        part.from_hf({**config, **change})
