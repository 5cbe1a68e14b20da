"""What is drawn: by seed and name alone, norms and biases where they say nothing."""

import pytest
import torch

from megamm.weights.draw import draw

WEIGHT = "llm.decoder.layers.0.mlp.linear_fc2.weight"


def test_a_draw_is_the_seeds_and_the_names():
    first = draw(WEIGHT, (64, 96), seed=3)
    torch.randn(5)  # torch's own generator plays no part
    assert torch.equal(draw(WEIGHT, (64, 96), seed=3), first)
    for other in (draw(WEIGHT, (64, 96), seed=4), draw(WEIGHT.replace("0", "1"), (64, 96), seed=3)):
        assert (other == first).float().mean() < 0.01


@pytest.mark.parametrize("std", [0.02, 1.0])
def test_weights_have_the_deviation_asked_for(std):
    tensor = draw(WEIGHT, (200, 300), seed=1, std=std)
    assert tensor.dtype == torch.float32
    assert tensor.std().item() == pytest.approx(std, rel=0.02) and abs(tensor.mean().item()) < 0.02 * std


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("llm.decoder.final_layernorm.weight", 1.0),
        ("llm.decoder.layers.0.input_layernorm.1.weight", 1.0),
        ("llm.decoder.layers.0.self_attention.linear_qkv.layer_norm_weight", 1.0),
        ("vision.pre_norm.weight", 1.0),
        ("vision.pre_norm.bias", 0.0),
        ("llm.decoder.layers.0.self_attention.linear_qkv.bias", 0.0),
    ],
)
def test_norms_begin_as_one_and_biases_as_zero(name, value):
    assert (draw(name, (7,), seed=1) == value).all()
