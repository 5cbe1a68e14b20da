"""mPLUG-Owl2's abstractor: its position tables against the authors', its cut norm against torch's."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megamm import backend
from megamm.config.schema import Parallel
from megamm.models.options import ProjectorOptions
from megamm.models.projector.abstractor_layers import InnerNorm, key_positions, sine_positions
from megamm.models.spec import Build, projector_config
from megamm.parallel import groups
from megamm.parallel.groups import gather_over_tp
from megamm.parallel.placement import Layout, Unit

SIZE, EPS = 24, 1e-6


def test_position_tables_equal_the_authors(golden):
    case = np.load(golden / "mplug_owl2/llama/cases/one_image.npz")
    for ours, name in (
        (sine_positions(torch.arange(8), 64), "abstractor_query_pos"),
        (key_positions(17, 64), "abstractor_key_pos"),
    ):
        np.testing.assert_allclose(ours.numpy(), case[name], rtol=0, atol=5e-7)


def test_features_that_are_no_square_and_a_class_token_have_no_positions():
    with pytest.raises(ValueError, match="16 features"):
        key_positions(16, 64)


def whole() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"x": (5, 2, SIZE), "upstream": (5, 2, SIZE), "weight": (SIZE,), "bias": (SIZE,)}
    return {name: torch.randn(shape, generator=generator) + (name == "x") * 3 for name, shape in shapes.items()}


def normalise(tp: int) -> list[torch.Tensor]:
    """Output and gradients of input, weight and bias, joined over the ranks."""
    backend.start("cpu")
    layout = Layout((tuple(Unit(name, 1.0, 1, 1) for name in ("projector", "llm.embed", "llm.head")),), 1)
    groups.start_distributed()
    ranks = groups.start(Parallel(tp=tp), layout)
    options = ProjectorOptions(kind="abstractor", in_size=8, out_size=8, num_heads=4)
    norm = InnerNorm(projector_config(options, Build(tp=tp, layout=layout)), SIZE, EPS)
    own = {name: tensor.chunk(tp, dim=-1)[ranks.tp_rank].clone() for name, tensor in whole().items()}
    norm.load_state_dict({name: own[name] for name in ("weight", "bias")})
    x = own["x"].requires_grad_()
    y = norm(x)
    (y * own["upstream"]).sum().backward()
    found = [y.detach(), x.grad, norm.weight.grad, norm.bias.grad]
    return [torch.cat(gather_over_tp(tensor), dim=-1) for tensor in found]


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_the_norm_over_cut_channels_is_a_layer_norm(tp, pool):
    tensors = whole()
    for name in ("x", "weight", "bias"):
        tensors[name].requires_grad_()
    y = F.layer_norm(tensors["x"], (SIZE,), tensors["weight"], tensors["bias"], EPS)
    (y * tensors["upstream"]).sum().backward()
    expected = [y.detach(), *(tensors[name].grad for name in ("x", "weight", "bias"))]
    for rank in pool.run(normalise, tp, ranks=tp):
        for ours, theirs in zip(rank, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-6)
