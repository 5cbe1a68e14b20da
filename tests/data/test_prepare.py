import io
import os
import signal

import numpy as np
import pytest
from PIL import Image

from megamm.data.faults import REASONS
from megamm.data.prepare import Document, Preparer, Recipe, count_faults, prepare
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


def test_processes_keep_the_order_and_the_faults(recipe):
    records = [record(answer=f"number {i}", images=["absent.jpg" if i % 7 == 3 else "good.jpg"]) for i in range(150)]

    def plain(results):
        return [str(r.fault) if isinstance(r, Fault) else (r.ids.tolist(), r.images, r.spans.tolist()) for r in results]

    alone = list(prepare(records, recipe, workers=1))
    assert plain(prepare(iter(records), recipe, workers=3)) == plain(alone)
    assert count_faults(r for r in alone if isinstance(r, Fault)) == {"image_missing": 21}
    assert sum(isinstance(r, Document) for r in alone) == 129


def test_death_of_a_process_is_one_clear_message(recipe, monkeypatch):
    monkeypatch.setattr("megamm.data.prepare.verify", lambda data: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(DataError, match="--workers: a process died .*is memory full"):
        list(prepare([record()] * 40, recipe, workers=2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"template": "v3"}, "template: unknown name 'v3'"),
        ({"template": "phi"}, "ends every answer of this template"),
        ({"image_dir": "absent"}, "absent: no such directory; --image-dir"),
    ],
)
def test_what_fits_no_sample_ends_the_run(changes, message, recipe, tmp_path):
    if "image_dir" in changes:
        changes = {"image_dir": tmp_path / changes["image_dir"]}
    fields = {name: getattr(recipe, name) for name in Recipe.__dataclass_fields__}
    with pytest.raises(DataError, match=message):
        Preparer(Recipe(**(fields | changes)))
