import io
import os
import struct
import subprocess
import sys
import warnings
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

from megamm.data.faults import SampleFault
from megamm.data.image import ImageFormat, decode, reencode, to_pixels, verify, verify_header

CLIP = ImageFormat(size=336, mean=(0.48145466, 0.4578275, 0.40821073), tokens=576)
SIGLIP = ImageFormat(size=384, mean=(0.5, 0.5, 0.5), resize="squash", tokens=729)
OWLEVAL = Path(os.environ.get("MEGAMM_OWLEVAL", Path(__file__).parents[3] / "shared" / "data" / "owleval"))


def smooth(size, seed=0):
    """A picture with gradients, edges and noise, so that chroma handling and resampling matter."""
    width, height = size
    y, x = np.mgrid[:height, :width]
    rgb = np.stack([x * 255 // width, y * 255 // height, (x // 7 + y // 5) % 2 * 200], axis=-1)
    noise = np.random.default_rng(seed).integers(0, 40, rgb.shape)
    return Image.fromarray((rgb + noise).clip(0, 255).astype(np.uint8))


def coded(picture, kind, **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def pillow(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def palette_with_transparency():
    picture = smooth((40, 30)).quantize(16)
    return coded(picture, "PNG", transparency=3)


def sixteen_bit():
    return coded(Image.fromarray((np.arange(1200).reshape(30, 40) * 50).astype(np.uint16)), "PNG")


def png_bomb(side):
    """Black, one bit per pixel: 300 kB for 50,000 x 50,000 pixels."""
    packed, rows = zlib.compressobj(1), bytes(100 * (1 + -(-side // 8)))  # each row with its filter byte in front
    data = b"".join(packed.compress(rows) for _ in range(side // 100)) + packed.flush()
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)), (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


EXIF = Image.Exif()
EXIF[274] = 6  # orientation: turn by 90 degrees

KINDS = {
    "jpeg_420": coded(smooth((61, 47)), "JPEG", subsampling="4:2:0"),
    "jpeg_422": coded(smooth((61, 47)), "JPEG", subsampling="4:2:2"),
    "jpeg_444": coded(smooth((61, 47)), "JPEG", subsampling="4:4:4", quality=98),
    "jpeg_progressive": coded(smooth((200, 33)), "JPEG", progressive=True),
    "jpeg_one_pixel": coded(smooth((1, 1)), "JPEG"),
    "jpeg_grey": coded(smooth((50, 40)).convert("L"), "JPEG"),
    "jpeg_cmyk": coded(smooth((50, 40)).convert("CMYK"), "JPEG"),
    "jpeg_exif_orientation": coded(smooth((50, 40)), "JPEG", exif=EXIF),
    "jpeg_with_a_tail": coded(smooth((50, 40)), "JPEG") + b"trailing bytes",
    "png": coded(smooth((50, 40)), "PNG"),
    "png_alpha": coded(smooth((50, 40)).convert("RGBA"), "PNG"),
    "png_grey_alpha": coded(smooth((50, 40)).convert("LA"), "PNG"),
    "png_one_bit": coded(smooth((50, 40)).convert("1"), "PNG"),
    "png_palette_transparency": palette_with_transparency(),
    "png_16_bit": sixteen_bit(),
    "webp": coded(smooth((50, 40)), "WEBP"),
    "bmp": coded(smooth((50, 40)), "BMP"),
    "gif_animated": coded(smooth((50, 40)), "GIF", save_all=True, append_images=[smooth((50, 40), seed=1)]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_decode_is_pillows_convert(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's advice about transparency in a palette
        assert np.array_equal(decode(KINDS[kind]), pillow(KINDS[kind]))
        verify(KINDS[kind])


BROKEN = {
    "empty": b"",
    "html": b"<html><body>404</body></html>",
    "jpeg_half": KINDS["jpeg_444"][: len(KINDS["jpeg_444"]) // 2],
    "jpeg_last_bytes_gone": KINDS["jpeg_420"][:-30],
    "jpeg_header_only": KINDS["jpeg_420"][:20],
    "jpeg_cmyk_half": KINDS["jpeg_cmyk"][: len(KINDS["jpeg_cmyk"]) // 2],
    "png_half": KINDS["png"][: len(KINDS["png"]) // 2],
    "gif_cut": KINDS["gif_animated"][:30],
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n",
    "format_of_no_photograph": coded(smooth((50, 40)), "PCX"),  # Pillow could read it, and ghostscript the one above
    "png_bomb": png_bomb(50_000),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("function", [decode, verify])
def test_broken_pictures_are_faults(kind, function):
    with pytest.raises(SampleFault) as fault:
        function(BROKEN[kind])
    assert fault.value.reason == "image_broken"


def test_what_headers_tell():
    """Of every sound picture nothing, of the others what is no picture, or too large a one."""
    for data in KINDS.values():
        verify_header(data)
    found = set()
    for kind, data in BROKEN.items():
        try:
            verify_header(data)
        except SampleFault as fault:
            assert fault.reason == "image_broken"
            found.add(kind)
    assert found >= {"png_bomb", "postscript", "format_of_no_photograph", "jpeg_header_only"}
    assert "jpeg_last_bytes_gone" not in found


def test_a_bomb_takes_little_memory(tmp_path):
    """In a process of its own: 7.5 GB of pixels, refused from the header."""
    (tmp_path / "bomb.png").write_bytes(BROKEN["png_bomb"])
    code = """
import resource, sys
from pathlib import Path
from megamm.data.faults import SampleFault
from megamm.data.image import decode, verify, verify_header
data = Path(sys.argv[1]).read_bytes()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for function in (decode, verify, verify_header):
    try:
        function(data)
    except SampleFault as fault:
        print(fault.reason, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    command = [sys.executable, "-c", code, tmp_path / "bomb.png"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [reason for reason, _ in lines] == ["image_broken"] * 3 and all(int(kb) < 20_000 for _, kb in lines)


def test_a_bomb_that_is_a_picture_decodes():
    assert decode(png_bomb(800)).shape == (800, 800, 3)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animated_picture_the_first_frame_counts(kind):
    frames = [smooth((50, 40), seed=seed) for seed in range(3)]
    still = coded(frames[0], kind, **({"lossless": True} if kind == "WEBP" else {}))
    moving = coded(
        frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
    )
    assert np.array_equal(decode(moving), decode(still))


@pytest.mark.parametrize("kind", ["jpeg_444", "png_alpha", "jpeg_cmyk"])
def test_reencode(kind):
    data = KINDS[kind]
    assert reencode(data, None, None) is data and reencode(data, 61, None) is data
    small = reencode(data, 25, None)
    assert max(decode(small).shape) == 25 and small.startswith(b"\xff\xd8")
    assert decode(reencode(data, None, 60)).shape == decode(data).shape
    assert reencode(data, None, 95) == coded(Image.fromarray(decode(data)), "JPEG", quality=95)
    with pytest.raises(SampleFault):
        reencode(data[:-30], 25, None)


def test_jpeg_bomb_is_refused_from_its_header():
    data = bytearray(KINDS["jpeg_420"])
    at = data.index(b"\xff\xc0") + 5  # height and width of the frame
    data[at : at + 4] = b"\xea\x60\xea\x60"
    for function in (decode, verify):
        with pytest.raises(SampleFault, match="60000 x 60000 pixels"):
            function(bytes(data))


def expand_to_square(picture, processor):
    """LLaVA's expand2square, transcribed."""
    width, height = picture.size
    if width == height:
        return picture
    side, colour = max(width, height), tuple(int(255 * mean) for mean in processor.image_mean)
    canvas = Image.new("RGB", (side, side), colour)
    canvas.paste(picture, (0, (width - height) // 2) if width > height else ((height - width) // 2, 0))
    return canvas


PROCESSORS = {
    "clip": (CLIP, CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})),
    "siglip": (SIGLIP, SiglipImageProcessorPil(size={"height": 384, "width": 384})),
}


def seen(picture, processor):
    """The published processor's pixels before it normalises them, float32 levels of 255 [3, H, W]."""
    options = {"return_tensors": "pt", "do_rescale": False, "do_normalize": False}
    return processor(picture, resample=Image.Resampling.BICUBIC, **options)["pixel_values"][0].float()


def sources(picture, processor):
    """What each `aspect` hands to the published processor."""
    stretched = picture.resize((max(picture.size),) * 2)  # as mPLUG-Owl2's README and evaluation do it
    return {"pad": expand_to_square(picture, processor), "stretch": stretched, "square": picture}


def limit(picture):
    """Largest mean difference in levels of 255. Every filter scales one edge after the other and rounds to 8 bits in
    between. In the same order two filters give the same but for a rounding here and there; in the other order a quarter
    of the values is a level apart. Pillow 13 scales the height first where that is less work, torch the width, and
    `to_pixels` the height of a padded portrait."""
    return 0.3 if picture.height > picture.width else 0.02


@pytest.mark.parametrize("tower", PROCESSORS)
@pytest.mark.parametrize("size", [(400, 300), (301, 400), (336, 336), (97, 640), (1, 3), (20, 20)])
def test_pixels_equal_the_published_processor(tower, size):
    image_format, processor = PROCESSORS[tower]
    picture = smooth(size)
    rgb = np.asarray(picture)
    for aspect, source in sources(picture, processor).items():
        found = to_pixels(rgb, replace(image_format, aspect=aspect))
        assert found.dtype == torch.uint8
        assert (found - seen(source, processor)).abs().mean() <= limit(picture)


@pytest.mark.parametrize("tower", PROCESSORS)
def test_pixels_that_are_not_resized_are_exact(tower):
    image_format, processor = PROCESSORS[tower]
    picture = smooth((image_format.size, image_format.size))
    assert torch.equal(to_pixels(np.asarray(picture), image_format).float(), seen(picture, processor))


@pytest.mark.parametrize("tower", PROCESSORS)
def test_real_photographs_equal_the_published_processor(tower):
    if not OWLEVAL.is_dir():
        pytest.skip(f"no OwlEval pictures at {OWLEVAL}; set MEGAMM_OWLEVAL")
    image_format, processor = PROCESSORS[tower]
    files = sorted((OWLEVAL / "images").iterdir())
    for file in files[::8]:
        data = file.read_bytes()
        rgb = decode(data)
        assert np.array_equal(rgb, pillow(data))
        picture = Image.fromarray(rgb)
        for aspect, source in sources(picture, processor).items():
            found = to_pixels(rgb, replace(image_format, aspect=aspect))
            assert (found - seen(source, processor)).abs().mean() <= min(limit(picture), 0.2), (file.name, aspect)
