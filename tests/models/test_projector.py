"""The linear projectors against the formula, with tensor parallelism."""

import pytest
import torch
import torch.nn.functional as F

from megamm import backend
from megamm.config.schema import Parallel
from megamm.models.options import ProjectorOptions
from megamm.models.projector import mlp
from megamm.models.projector.layers import Projector
from megamm.models.spec import Build, projector_config
from megamm.parallel import groups
from megamm.parallel.groups import gather_over_tp
from megamm.parallel.placement import Layout, Unit

IN, OUT = 12, 16


def weights(kind: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"linear_1.weight": (OUT, IN), "linear_1.bias": (OUT,)}
    for k in range(2, ProjectorOptions(kind=kind, in_size=IN, out_size=OUT).num_linears + 1):
        shapes |= {f"linear_{k}.weight": (OUT, OUT), f"linear_{k}.bias": (OUT,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def project(kind: str, tp: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Output of the projector of this rank, and the whole gradients of its weights."""
    backend.start("cpu")
    options = ProjectorOptions(kind=kind, in_size=IN, out_size=OUT)
    layout = Layout((tuple(Unit(name, 1.0, 1, 1) for name in ("projector", "llm.embed", "llm.head")),), 1)
    groups.start_distributed()
    ranks = groups.start(Parallel(tp=tp), layout)
    module = Projector(options, projector_config(options, Build(tp=tp, layout=layout)))
    table, parameters = mlp.keys(options), dict(module.named_parameters())
    assert sorted(parameters) == sorted(entry.name for entry in table.entries())
    with torch.no_grad():
        for name, whole in weights(kind).items():
            parameters[name].copy_(table[name].slice(whole, ranks.tp_rank, tp))
    x_PIH = torch.arange(5 * 2 * IN, dtype=torch.float32).view(5, 2, IN) / 100
    out = module(x_PIH)
    out.square().sum().backward()
    grads = {}
    for name, parameter in parameters.items():
        slices = gather_over_tp(parameter.grad) if table[name].partition_dim is not None else [parameter.grad]
        grads[name] = table[name].join(slices)
    return out.detach(), grads


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu", "mlp3x_gelu", "mlp4x_gelu"])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_projector_equals_the_formula(kind, tp, pool):
    own = {name: tensor.requires_grad_() for name, tensor in weights(kind).items()}
    x = torch.arange(5 * 2 * IN, dtype=torch.float32).view(5, 2, IN) / 100
    expected = F.linear(x, own["linear_1.weight"], own["linear_1.bias"])
    for k in range(2, len(own) // 2 + 1):
        expected = F.linear(F.gelu(expected), own[f"linear_{k}.weight"], own[f"linear_{k}.bias"])
    expected.square().sum().backward()
    for out, grads in pool.run(project, kind, tp, ranks=tp):
        assert_equal_up_to_rounding(out, expected.detach(), "output")
        assert grads.keys() == own.keys()
        for name, grad in grads.items():
            assert_equal_up_to_rounding(grad, own[name].grad, name)


def assert_equal_up_to_rounding(found: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    """By the largest element: those near zero are sums of large ones."""
    assert found.shape == expected.shape, name
    assert (found - expected).abs().max() <= 2e-6 * expected.abs().max(), name
