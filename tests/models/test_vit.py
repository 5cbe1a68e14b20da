"""8-bit pixels become, on the stage of the tower's embedding, what the published processors make of them."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

from megamm.models.vision import clip, siglip
from megamm.models.vision.vit import Normalise

CPU = torch.device("cpu")
TOWERS = {"clip": (clip.IMAGE, CLIPImageProcessorPil), "siglip": (siglip.IMAGE, SiglipImageProcessorPil)}


@pytest.mark.parametrize("tower", TOWERS)
def test_pixels_are_normalised_as_by_the_published_processor(tower):
    image, processor = TOWERS[tower]
    rgb = np.random.default_rng(0).integers(0, 256, (2, 9, 7, 3), dtype=np.uint8)
    pictures = [Image.fromarray(picture) for picture in rgb]
    expected = processor(do_resize=False, do_center_crop=False)(pictures, return_tensors="pt")["pixel_values"]
    found = Normalise(image, CPU)(torch.from_numpy(rgb).permute(0, 3, 1, 2))
    assert found.dtype == torch.float32 and found.is_contiguous()
    assert (found - expected).abs().max() < 1e-6


def test_floating_point_pixels_are_normalised_already():
    pixels = torch.randn(1, 3, 4, 4)
    assert Normalise(clip.IMAGE, CPU)(pixels) is pixels


def test_no_checkpoint_holds_mean_and_std():
    normalise = Normalise(clip.IMAGE, CPU)
    assert not normalise.state_dict() and not [*normalise.parameters()]
