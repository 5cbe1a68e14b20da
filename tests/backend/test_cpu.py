"""The CPU backend: its layers against their references, and every redirection."""

import pytest
import torch
import torch.nn.functional as F

from megamm import backend
from megamm.errors import MegammError


@pytest.fixture(scope="module", autouse=True)
def cpu():
    return backend.start("cpu")


def config(**kwargs):
    from megatron.core.transformer import TransformerConfig

    return TransformerConfig(
        **{**dict(num_layers=1, hidden_size=32, num_attention_heads=4, attention_dropout=0.0), **kwargs}
    )


@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_equals_torch_and_marks_its_weights_for_sequence_parallel(kind, dtype):
    from megamm.backend.cpu import Norm

    norm = Norm(config(normalization=kind, params_dtype=dtype), 32, eps=1e-3)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(5, 3, 32, dtype=dtype)
    if kind == "RMSNorm":
        expected = F.rms_norm(x.float(), (32,), eps=1e-3).to(dtype) * norm.weight
    else:
        torch.nn.init.normal_(norm.bias)
        expected = F.layer_norm(x, (32,), norm.weight, norm.bias, 1e-3)
    torch.testing.assert_close(norm(x), expected)
    assert not norm.weight.sequence_parallel
    parallel = Norm(config(normalization=kind, tensor_model_parallel_size=2, sequence_parallel=True), 32)
    assert parallel.weight.sequence_parallel


def attention(mask_type, **kwargs):
    from megatron.core.transformer.enums import AttnMaskType

    from megamm.backend.cpu import SdpaAttention

    return SdpaAttention(config(**kwargs), 1, AttnMaskType[mask_type], "self")


def plain_attention(q, k, v, mask):
    """softmax(q k^T / sqrt(D)) v, written out; [S, B, N, D] -> [S, B, N * D]."""
    repeat = q.size(2) // k.size(2)
    k, v = (x.repeat_interleave(repeat, dim=2) for x in (k, v))
    scores = torch.einsum("sbnd,tbnd->bnst", q, k) / q.size(3) ** 0.5
    weights = scores.masked_fill(mask, -torch.inf).softmax(-1)
    return torch.einsum("bnst,tbnd->sbnd", weights, v).flatten(2)


@pytest.mark.parametrize("mask_type", ["causal", "no_mask"])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_attention_equals_the_formula(mask_type, groups):
    q = torch.randn(7, 2, 4, 8, dtype=torch.float64)
    k, v = (torch.randn(7, 2, groups, 8, dtype=torch.float64) for _ in range(2))
    mask = torch.ones(7, 7, dtype=torch.bool).triu(1) & (mask_type == "causal")
    ours = attention(mask_type, num_query_groups=groups)
    torch.testing.assert_close(ours(q, k, v, None), plain_attention(q, k, v, mask))
    only_self = ~torch.eye(7, dtype=torch.bool)
    torch.testing.assert_close(ours(q, k, v, only_self), plain_attention(q, k, v, only_self))


def test_packed_segments_do_not_see_each_other():
    from megatron.core.packed_seq_params import PackedSeqParams

    q, k, v = (torch.randn(9, 4, 8, dtype=torch.float64) for _ in range(3))
    bounds = [0, 4, 4, 9]
    ours = attention("causal")
    packed = ours(q, k, v, None, packed_seq_params=PackedSeqParams(cu_seqlens_q=torch.tensor(bounds)))
    apart = [ours(*(x[a:b].unsqueeze(1) for x in (q, k, v)), None) for a, b in ((0, 4), (4, 9))]
    torch.testing.assert_close(packed, torch.cat(apart))


@pytest.mark.parametrize("length", [3, 4, 9])
def test_a_window_hides_what_is_farther_back_in_packed_segments_too(length):
    """A window of 4: the query's own position and three before."""
    from megatron.core.packed_seq_params import PackedSeqParams

    q, k, v = (torch.randn(length, 1, 4, 8, dtype=torch.float64) for _ in range(3))
    distance = torch.arange(length)[:, None] - torch.arange(length)
    ours = attention("causal", window_size=(3, 0))
    torch.testing.assert_close(ours(q, k, v, None), plain_attention(q, k, v, (distance < 0) | (distance >= 4)))
    bounds = torch.tensor([0, 2, length])
    packed = ours(*(x.squeeze(1) for x in (q, k, v)), None, packed_seq_params=PackedSeqParams(cu_seqlens_q=bounds))
    apart = [ours(*(x[a:b] for x in (q, k, v)), None) for a, b in ((0, 2), (2, length))]
    torch.testing.assert_close(packed, torch.cat(apart))
    with pytest.raises(ValueError, match="needs causal attention"):
        attention("no_mask", window_size=(3, 0))


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_fused_adam_is_adamw(decay):
    from megamm.backend.cpu import FusedAdam

    ours = [torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(5))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    settings = dict(lr=1e-2, betas=(0.8, 0.9), eps=1e-6, weight_decay=decay)
    a, b = FusedAdam(ours, **settings), torch.optim.AdamW(theirs, **settings)
    for _ in range(5):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    assert a.param_groups[0]["step"] == 5 and "step" not in a.state[ours[0]]


@pytest.mark.parametrize(
    "name", ["arange", "empty", "full", "ones", "rand", "randn", "randint", "tensor", "zeros", "linspace"]
)
def test_factories_ignore_cuda(name):
    args = {"full": ((2,), 1.0), "randint": (3, (2,)), "tensor": ([1.0],), "arange": (3,), "linspace": (0, 1, 3)}
    made = getattr(torch, name)(*args.get(name, ((2,),)), device="cuda")
    assert made.device.type == "cpu"
    assert torch.zeros_like(made, device=torch.cuda.current_device()).device.type == "cpu"
    assert torch.empty(2, device="meta").device.type == "meta"
    with torch.device("meta"):
        assert getattr(torch, name)(*args.get(name, ((2,),))).device.type == "meta"


def test_tensor_and_module_methods_stay_on_the_cpu():
    x = torch.zeros(2)
    assert x.cuda() is x and x.pin_memory() is x
    assert x.to("cuda").device.type == "cpu" and x.to(device=torch.device("cuda", 0)).device.type == "cpu"
    assert x.to(torch.bfloat16).dtype == torch.bfloat16 and x.to("meta").device.type == "meta"
    assert x.type() == "torch.cuda.FloatTensor" and x.bfloat16().type() == "torch.cuda.BFloat16Tensor"
    assert x.type(torch.int32).dtype == torch.int32
    module = torch.nn.Linear(2, 2)
    assert module.cuda() is module


def test_streams_events_and_synchronisation_do_nothing():
    stream = torch.cuda.Stream(device=torch.cuda.current_device())
    stream.wait_stream(torch.cuda.default_stream())
    with torch.cuda.stream(stream):
        torch.cuda.Event(enable_timing=True).record()
    torch.cuda.synchronize()
    torch.cuda.nvtx.range_push("x")
    torch.cuda.nvtx.range_pop()


def test_the_tracker_forks_the_one_generator():
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    torch.cuda.manual_seed(1)
    tracker.add("other", 7)
    before = torch.cuda.get_rng_state()
    with tracker.fork("other"):
        first = torch.rand(3)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    with tracker.fork("other"):
        second = torch.rand(3)
    assert not torch.equal(first, second)
    torch.manual_seed(7)
    assert torch.equal(first, torch.rand(3))


def test_the_optimizer_is_ours():
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    from megamm.backend.cpu import FusedAdam

    assert optimizer.Adam is distrib_optimizer.Adam is FusedAdam
    assert not optimizer.USING_PYTORCH_OPTIMIZER and distrib_optimizer.USING_APEX_OPTIMIZER


def test_precision_is_never_dropped_silently(cpu):
    cpu.check_precision("bf16")
    with pytest.raises(MegammError, match="fp8 cannot run on the cpu backend.*fp32, bf16"):
        cpu.check_precision("fp8")


def test_asking_for_a_gpu_without_one_is_an_error():
    from megamm.backend import gpu

    with pytest.raises(MegammError, match="sees no GPU"):
        gpu.start(0)
    with pytest.raises(MegammError, match="already runs on cpu"):
        backend.start("gpu")
