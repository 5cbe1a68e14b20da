"""Slices against the cuts they promise, element by element."""

import pytest
import torch

from megamm.weights.shard import cut_vocab, join_slices, pad_vocab, slice_tensor

WHOLE = torch.arange(8 * 4).reshape(8, 4)


@pytest.mark.parametrize(
    "tp, rank, expected",
    [
        (None, 1, WHOLE),
        ("col", 1, WHOLE[4:]),
        ("vocab", 0, WHOLE[:4]),
        ("row", 1, WHOLE[:, 2:]),
        ("col2", 0, WHOLE[[0, 1, 4, 5]]),
        ("col2", 1, WHOLE[[2, 3, 6, 7]]),
    ],
)
def test_slices(tp, rank, expected):
    assert torch.equal(slice_tensor(WHOLE, tp, rank, 2), expected)


@pytest.mark.parametrize("tp", [None, "col", "row", "col2", "vocab"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_joined_slices_are_the_whole(tp, size):
    slices = [slice_tensor(WHOLE, tp, rank, size) for rank in range(size)]
    assert torch.equal(join_slices(slices, tp), WHOLE)


@pytest.mark.parametrize("tp, size", [("col", 3), ("row", 3), ("col2", 8)])
def test_an_uneven_cut_is_refused(tp, size):
    with pytest.raises(ValueError, match=f"does not divide by tensor parallel size {size}"):
        slice_tensor(WHOLE, tp, 0, size)


def test_vocabulary_is_padded_with_zero_rows_and_cut_again():
    padded = pad_vocab(WHOLE, 8, 12)
    assert padded.shape == (12, 4) and not padded[8:].any()
    assert torch.equal(cut_vocab(padded, 8, 12), WHOLE)
    with pytest.raises(ValueError, match="8 rows where the vocabulary has 7"):
        pad_vocab(WHOLE, 7, 12)
    with pytest.raises(ValueError, match="8 rows where the padded vocabulary has 12"):
        cut_vocab(WHOLE, 7, 12)
