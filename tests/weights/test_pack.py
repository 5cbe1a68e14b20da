"""Packings against the layouts they promise, element by element."""

import pytest
import torch

from megamm.weights.keymap import Dims
from megamm.weights.pack import PACKINGS


def test_qkv_interleaves_per_group():
    heads, groups, head_width = 4, 2, 3
    q = torch.arange(heads * head_width)
    k = 100 + torch.arange(groups * head_width)
    v = 200 + torch.arange(groups * head_width)
    packed = PACKINGS["qkv"].pack([q, k, v], Dims(heads=heads, groups=groups))
    assert packed.tolist() == [0, 1, 2, 3, 4, 5, 100, 101, 102, 200, 201, 202,
                               6, 7, 8, 9, 10, 11, 103, 104, 105, 203, 204, 205]  # fmt: skip


def test_fused_qkv_is_all_queries_then_all_keys_then_all_values():
    sizes, generator = Dims(heads=4, groups=2), torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(rows, 5, generator=generator) for rows in (12, 6, 6))
    packed = PACKINGS["qkv_fused"].pack([torch.cat([q, k, v])], sizes)
    assert torch.equal(packed, PACKINGS["qkv"].pack([q, k, v], sizes))
    assert torch.equal(PACKINGS["qkv_fused"].unpack(packed, sizes)[0], torch.cat([q, k, v]))
    with pytest.raises(ValueError, match="do not fit 4 query heads and 2 key/value groups"):
        PACKINGS["qkv_fused"].pack([torch.zeros(20, 5)], sizes)


def test_cat2_puts_the_first_before_the_second():
    packed = PACKINGS["cat2"].pack([torch.zeros(2, 3), torch.ones(2, 3)], Dims())
    assert packed.tolist() == [[0] * 3] * 2 + [[1] * 3] * 2


def test_kv_puts_each_groups_value_behind_its_key():
    sizes = Dims(heads=4, groups=2)
    packed = PACKINGS["kv"].pack([torch.arange(6), 100 + torch.arange(6)], sizes)
    assert packed.tolist() == [0, 1, 2, 100, 101, 102, 3, 4, 5, 103, 104, 105]
    assert [tensor.tolist() for tensor in PACKINGS["kv"].unpack(packed, sizes)] == [
        list(range(6)),
        list(range(100, 106)),
    ]
    with pytest.raises(ValueError, match="do not fit 2 key/value groups"):
        PACKINGS["kv"].pack([torch.zeros(5), torch.zeros(5)], sizes)


@pytest.mark.parametrize(("name", "shape"), [("lead1", (1, 2, 3)), ("lead2", (1, 1, 2, 3))])
def test_leading_ones_are_left_out(name, shape):
    whole = torch.arange(6).view(shape)
    packed = PACKINGS[name].pack([whole], Dims())
    assert torch.equal(packed, torch.arange(6).view(2, 3))
    assert torch.equal(PACKINGS[name].unpack(packed, Dims())[0], whole)
    assert PACKINGS[name].pack([whole.to("meta")], Dims()).shape == (2, 3)
    with pytest.raises(ValueError, match="must be 1"):
        PACKINGS[name].pack([torch.zeros(2, 2, 3)], Dims())


@pytest.mark.parametrize("name", [name for name in PACKINGS if not name.startswith("lead")])
def test_shapes_are_told_without_data(name):
    packing = PACKINGS[name]
    sizes = Dims(heads=2, groups=2)
    metas = [torch.empty(12, 5, dtype=torch.bfloat16, device="meta") for _ in range(packing.num_hf)]
    packed = packing.pack(metas, sizes)
    assert packed.is_meta and packed.shape == (12 * packing.num_hf, 5)
    assert [tuple(tensor.shape) for tensor in packing.unpack(packed, sizes)] == [(12, 5)] * packing.num_hf
