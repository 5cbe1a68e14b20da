"""The layer of visual words by itself: any number of chunks, and never a whole vocabulary's columns on one rank."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer import TransformerConfig
from torch.utils._python_dispatch import TorchDispatchMode

from megamm import backend
from megamm.batch import IMAGE
from megamm.config.schema import Loss, Parallel
from megamm.models.layers import visual_words
from megamm.models.layers.visual_words import VisualWords, vocabulary_log_softmax, word_targets
from megamm.parallel import groups
from megamm.parallel.placement import Layout, Unit
from megamm.verify import Request
from tests.cases import check_cases
from tests.models.words import VARIANTS

WIDTH, WORDS = 24, 200
"""256 rows of the vocabulary are stored."""
LAYOUT = Layout(((Unit("llm.embed", 1.0, 1, 1), Unit("llm.head", 1.0, 1, 1)),), 1)


def set_chunk(rows: int) -> int:
    """Change it on this rank; returns what it was."""
    before, visual_words.CHUNK = visual_words.CHUNK, rows
    return before


@pytest.mark.parametrize("variant", ["llama", "pif"])
def test_many_small_chunks_change_nothing(variant, golden, pool):
    directory = golden / "vw_lmm" / variant
    hf = str(directory / "hf")
    before = pool.run(set_chunk, 4, ranks=4)[0]
    try:
        request = Request(
            hf=hf, tower=f"{hf}/vision_tower", family=VARIANTS[variant].name, tp=2, pp=2, sequence_parallel=True
        )
        check_cases(request, sorted((directory / "cases").glob("*.npz")), pool)
    finally:
        pool.run(set_chunk, before, ranks=4)


class Shapes(TorchDispatchMode):
    """Records the shape of everything that is computed."""

    def __init__(self):
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        found = out if isinstance(out, tuple | list) else [out]
        self.seen |= {tuple(x.shape) for x in found if isinstance(x, torch.Tensor)}
        return out


def run_layer(tp: int) -> tuple[float, float, list[tuple[int, ...]]]:
    """Loss, norm of the gradient of the visual tokens, and every shape of a pass there and back."""
    backend.start("cpu")
    groups.start_distributed()
    groups.start(Parallel(tp=tp), LAYOUT)
    rank = torch.distributed.get_rank()
    config = TransformerConfig(
        num_layers=1, hidden_size=WIDTH, num_attention_heads=4, tensor_model_parallel_size=tp,
        use_cpu_initialization=True, perform_initialization=False,
    )  # fmt: skip
    options = SimpleNamespace(hidden_size=WIDTH, vocab_size=WORDS, padded_vocab_size=256)
    words = VisualWords(options, config, is_copy=False)
    draw = torch.Generator().manual_seed(0)
    vm_head, head = (torch.randn(256, WIDTH, generator=draw).chunk(tp)[rank] for _ in range(2))
    words.vm_head.weight.data.copy_(vm_head)
    features = torch.randn(40, WIDTH, generator=draw, requires_grad=True)
    hidden = torch.randn(30, 2, WIDTH, generator=draw, requires_grad=True)
    ids = torch.zeros(2, 30, dtype=torch.int64)
    ids[:, :20] = IMAGE  # a picture at the very beginning: its first token is predicted by nothing
    slots = (ids.flatten() == IMAGE).nonzero().flatten()
    positions = torch.arange(30).expand(2, 30)
    batch = SimpleNamespace(ids_BS=ids, positions_BS=positions, slots_K=slots, rows_K=torch.arange(40))
    before = set_chunk(8)
    with Shapes() as shapes:
        kl_BS = words(features, hidden, head.requires_grad_(), batch, Loss())
        kl_BS.sum().backward()
    set_chunk(before)
    assert torch.equal(kl_BS != 0, word_targets(batch)) and int(word_targets(batch).sum()) == 38
    return kl_BS.sum().item(), features.grad.norm().item(), sorted(shapes.seen)


def test_no_rank_ever_holds_a_whole_vocabulary_or_all_visual_tokens(pool):
    [(loss, norm, shapes)] = pool.run(run_layer, 1, ranks=1)
    assert (8, 256) in shapes and (40, 256) not in shapes
    for other_loss, other_norm, shapes in pool.run(run_layer, 4, ranks=4):
        assert (other_loss, other_norm) == pytest.approx((loss, norm), rel=1e-5)
        assert (8, 64) in shapes and (40, 64) not in shapes
        assert not any(256 in shape or 200 in shape for shape in shapes)


def check_gradients() -> bool:
    """torch's own check by finite differences, in double precision, padding included."""
    backend.start("cpu")
    groups.start_distributed()
    groups.start(Parallel(), LAYOUT)
    logits = torch.randn(3, 11, dtype=torch.float64, requires_grad=True)
    real = torch.arange(11) < 9
    return torch.autograd.gradcheck(
        lambda x: vocabulary_log_softmax(x.masked_fill(~real, -torch.inf))[:, :9], (logits,)
    )


def test_the_gradient_of_the_vocabulary_parallel_softmax_is_right(pool):
    assert pool.run(check_gradients, ranks=1) == [True]
