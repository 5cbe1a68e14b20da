"""Hidden states and features in one tensor, and back."""

import torch

from megamm.parallel import carry


def test_what_is_packed_comes_out_again():
    x_SBH, features_R1H = torch.randn(5, 2, 4), torch.randn(7, 1, 4)
    packed = carry.pack(x_SBH, features_R1H)
    assert packed.shape == (17, 1, 4)
    x, features = carry.unpack(packed, 5, 2)
    assert torch.equal(x, x_SBH) and torch.equal(features, features_R1H)


def test_gradients_of_both_parts_come_back():
    x_SBH, features_R1H = torch.randn(3, 2, 4, requires_grad=True), torch.randn(2, 1, 4, requires_grad=True)
    x, features = carry.unpack(carry.pack(x_SBH, features_R1H), 3, 2)
    (x.sum() + 2 * features.sum()).backward()
    assert (x_SBH.grad == 1).all() and (features_R1H.grad == 2).all()
