import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from megamm.data.faults import REASONS, REMEDIES
from megamm.data.prepare import Preparer, Recipe, count_faults
from megamm.data.sources import Fault, Record
from megamm.errors import DataError


def jpeg(size=(40, 30)):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def recipe(make_tokenizer, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    (images / "good.jpg").write_bytes(jpeg())
    (images / "cut.jpg").write_bytes(jpeg()[:-200])
    (images / "empty.jpg").write_bytes(b"")
    (images / "page.jpg").write_bytes(b"<html>not found</html>")
    return Recipe(image_dir=images, tokenizer_dir=make_tokenizer("spm"), template="v1", marker="<image>")


def test_every_reason_has_a_remedy():
    assert REASONS.keys() == REMEDIES.keys()


def record(images=("good.jpg",), question="<image>\nWhat?", answer="A cat", role="human"):
    return Record(where="set item 1", id="", images=list(images), turns=[(role, question), ("gpt", answer)])


def test_document(recipe):
    document = Preparer(recipe)(record())
    assert document.images == [jpeg()] and (document.ids == -200).sum() == 1 and document.spans.dtype == np.int32
    assert Preparer(recipe)(record(images=(), question="What?")).images == []


@pytest.mark.parametrize(
    ("changes", "reason", "detail"),
    [
        ({"images": ["absent.jpg"]}, "image_missing", "absent.jpg"),
        ({"images": ["../images/../x.jpg"]}, "image_outside", "x.jpg"),
        ({"images": ["cut.jpg"]}, "image_broken", "cut.jpg"),
        ({"images": ["empty.jpg"]}, "image_broken", "empty.jpg"),
        ({"images": ["page.jpg"]}, "image_broken", "page.jpg"),
        ({"images": []}, "marker_count", "1 markers, 0 pictures"),
        ({"question": "What?"}, "marker_count", "0 markers, 1 pictures"),
        ({"answer": ""}, "no_answer", "round 1"),
        ({"role": "user"}, "bad_roles", "'user'"),
    ],
)
def test_each_fault_has_its_reason(changes, reason, detail, recipe):
    result = Preparer(recipe)(record(**changes))
    assert isinstance(result, Fault) and result.where == "set item 1" and result.fault.reason == reason
    assert str(result.fault).startswith(REASONS[reason]) and detail in str(result.fault)


def test_several_pictures_and_pictures_between_the_text(recipe):
    three = ["good.jpg", jpeg(), "good.jpg"]
    document = Preparer(recipe)(record(images=three, question="<image>\nA\n<image>\nor <image>?"))
    assert len(document.images) == 3 and (document.ids == -200).sum() == 3
    places = np.flatnonzero(document.ids == -200)
    assert places[1] - places[0] > 1 and places[2] - places[1] > 1  # where they were written
    in_front = Preparer(recipe)(record(question="What <image> <image>?"))  # LLaVA's rule, where it fits
    assert (in_front.ids == -200).sum() == 1


def test_the_models_own_marker(recipe):
    own = Preparer(replace(recipe, marker="<|image|>"))
    for marker in ("<image>", "<|image|>"):
        assert (own(record(question=f"{marker}\nWhat?")).ids == -200).sum() == 1


def test_videos_are_faults(recipe):
    result = Preparer(recipe)(replace(record(), videos=["a.mp4"]))
    assert result.fault.reason == "video"


def size(data):
    return Image.open(io.BytesIO(data)).size


def test_pictures_are_changed_only_where_asked(recipe):
    def stored(**changes):
        (image,) = Preparer(replace(recipe, **changes))(record()).images
        return image

    assert stored() == stored(max_side=40) == jpeg()  # 30 x 40 pixels
    assert size(stored(max_side=20)) == (15, 20) and size(stored(quality=50)) == (30, 40)
    assert len(stored(quality=10)) < len(stored(quality=50)) < len(jpeg())
    assert stored(max_side=20, quality=50) == stored(max_side=20, quality=50) != stored(max_side=20)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"template": "v3"}, "template: unknown name 'v3'"),
        ({"template": "phi"}, "ends every answer of this template"),
        ({"image_dir": "absent"}, "absent: no such directory; --image-dir"),
        ({"prompt_style": "vqa"}, "--prompt-style: unknown 'vqa'; choose one of none, short_answer"),
    ],
)
def test_what_fits_no_sample_ends_the_run(changes, message, recipe, tmp_path):
    if "image_dir" in changes:
        changes = {"image_dir": tmp_path / changes["image_dir"]}
    with pytest.raises(DataError, match=message):
        Preparer(replace(recipe, **changes))


def test_faults_are_counted(recipe):
    results = [Preparer(recipe)(record(images=[name])) for name in ("absent.jpg", "cut.jpg", "gone.jpg")]
    assert count_faults(results) == {"image_missing": 2, "image_broken": 1}
