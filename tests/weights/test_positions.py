"""Positions for pictures of another size; that they are interpolated as authors do it is tested with their models."""

import pytest
import torch

from megamm.weights.positions import resize_positions


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("leading", [(), (1,)])
def test_the_class_token_stays_and_even_patches_stay_even(first, leading):
    rows = torch.full((first + 16, 3), 0.5, dtype=torch.bfloat16)
    rows[:first] = 7.0
    found = resize_positions(rows.reshape(*leading, *rows.shape), (*leading, first + 36, 3))
    assert found.shape == (*leading, first + 36, 3) and found.dtype == torch.bfloat16
    found = found.reshape(-1, 3)
    assert (found[:first] == 7.0).all() and (found[first:] == 0.5).all()


def test_rows_stay_rows_and_columns_columns():
    row, column = torch.meshgrid(torch.arange(3.0), torch.arange(3.0), indexing="ij")
    found = resize_positions(torch.stack([row, column], dim=-1).reshape(9, 2), (36, 2)).reshape(6, 6, 2)
    torch.testing.assert_close(found[..., 0], found[..., 1].T)
    assert (found[1:, :, 0] > found[:-1, :, 0]).all()


@pytest.mark.parametrize(
    ("rows", "shape", "message"),
    [
        (17, (16, 3), r"\(17, 3\) cannot become \(16, 3\)"),
        (16, (36, 4), r"\(16, 3\) cannot become \(36, 4\)"),
        (16, (1, 36, 3), "cannot become"),
        (6, (16, 3), "6 positions are no square of patches"),
        (16, (7, 3), "7 positions are no square of patches"),
    ],
)
def test_positions_of_another_model_are_refused(rows, shape, message):
    with pytest.raises(ValueError, match=message):
        resize_positions(torch.zeros(rows, 3), shape)
