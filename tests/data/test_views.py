"""Pictures cut into tiles, video frames, and the text around them, against mPLUG-Owl3's published rules."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from megamm.batch import IGNORE, IMAGE
from megamm.data.faults import SampleFault
from megamm.data.image import ImageFormat, picture_size, to_pixels, to_views
from megamm.data.indexed import Reader, Writer
from megamm.data.loader import Dataset, collate
from megamm.data.prepare import Document, Preparer, Recipe
from megamm.data.sources import Fault, Record
from megamm.data.template import template
from megamm.data.text import expand, tokenise
from megamm.data.tokenizer import load_tokenizer
from megamm.data.views import ANCHORS, ViewRules, choose_anchor, choose_frames, frames_text, lay_out, tiles_text
from megamm.errors import DataError

QUIET = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
MARK = "<image>"
ADDED = {"<|im_start|>": 457, "<|im_end|>": 458}
FORMAT = ImageFormat(size=8, mean=(0.5,) * 3, aspect="square", resize="squash", tokens=4)


def rgb(width, height, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(width, height, seed=0):
    file = io.BytesIO()
    Image.fromarray(rgb(width, height, seed)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("side", [384, 378])
@pytest.mark.parametrize(
    ("size", "anchor"),
    [
        ((500, 500), (2, 2)),
        ((640, 480), (2, 3)),
        ((1920, 1080), (2, 3)),
        ((1024, 768), (2, 3)),
        ((480, 640), (3, 2)),
        ((1600, 400), (1, 4)),
        ((300, 1200), (4, 1)),
        ((1200, 400), (1, 3)),
        ((200, 600), (3, 1)),
    ],
)
def test_the_grid_is_that_of_the_authors(size, anchor, side):
    assert choose_anchor(*size, side) == anchor


def test_texts_of_both_generations():
    assert tiles_text(2, 3, "v2", "<|image|>") == (
        "Cut to 2 rows 3 columns with a global view\n"
        "subimg(1,1)<|image|> subimg(1,2)<|image|> subimg(1,3)<|image|>\n"
        "subimg(2,1)<|image|> subimg(2,2)<|image|> subimg(2,3)<|image|>\n"
        "global_view<|image|>"
    )
    assert tiles_text(2, 3, "v3", "<|image|>") == (
        "<|start_cut|>2*3\n<|image|> <|image|> <|image|>\n<|image|> <|image|> <|image|>\n<|image|><|end_cut|>"
    )
    assert frames_text(2, "v2", "X") == "XX"
    assert frames_text(2, "v3", "X") == "<|start_video_frame|>XX<|end_video_frame|>"


@pytest.mark.parametrize(
    ("num_frames", "rate", "most", "chosen"),
    [
        (100, 25.0, 16, [0, 25, 50, 75]),
        (100, 29.97, 2, [30, 90]),  # 0 30 60 90: the middles of two runs of two
        (10, 0.2, 4, [1, 3, 6, 8]),
        (1, 30.0, 16, [0]),
        (0, 30.0, 16, []),
    ],
)
def test_frames_are_one_a_second_and_the_middles_of_equal_runs(num_frames, rate, most, chosen):
    assert choose_frames(num_frames, rate, most) == chosen


def turns(question, answer="yes"):
    return [("human", question), ("gpt", answer)]


def test_pictures_and_videos_are_laid_out_in_the_order_of_their_markers():
    pictures = [(b"a", (640, 480)), (b"b", (10, 10))]
    videos = [[b"1", b"2", b"3"]]
    laid_out, views = lay_out(
        turns("A <image> B <video> C <image>"), pictures, videos, ViewRules(cut="all", text="v3"), MARK
    )
    frames = "<|start_video_frame|><image><image><image><|end_video_frame|>"
    assert laid_out == turns(f"A <image> B {frames} C <image>")  # beside a video nothing is cut
    assert views == [b"a", b"1", b"2", b"3", b"b"]


@pytest.mark.parametrize(("cut", "num_views"), [("none", [1, 1]), ("single", [1, 1]), ("all", [7, 5])])
def test_which_pictures_are_cut(cut, num_views):
    pictures = [(b"a", (640, 480)), (b"b", (10, 10))]
    rules = ViewRules(cut=cut)
    (question, _), views = lay_out(turns("<image><image>"), pictures, [], rules, MARK)
    assert len(views) == sum(num_views) == question[1].count(MARK) and views[num_views[0]] == b"b"
    assert [view for view in views if view is not None] == [b"a", b"b"]
    (question, _), views = lay_out(turns("<image>Q"), pictures[:1], [], rules, MARK)
    assert views == [b"a"] + [None] * (0 if cut == "none" else 6)
    assert lay_out(turns("only text"), [], [], rules, MARK) == (turns("only text"), [])


@pytest.mark.parametrize(
    ("question", "num_pictures", "num_videos", "changes", "reason"),
    [
        ("<image>", 2, 0, {}, "marker_count"),
        ("<image><image>", 1, 0, {}, "marker_count"),
        ("<video>", 0, 0, {}, "marker_count"),
        ("none", 0, 1, {}, "marker_count"),
        ("<image><video>", 1, 1, {"text": "v2"}, "bad_record"),
        ("<image>", 1, 0, {"cut": "all", "max_views": 6}, "too_many_views"),
        ("<video>", 0, 1, {"max_views": 1}, "too_many_views"),
    ],
)
def test_layout_faults(question, num_pictures, num_videos, changes, reason):
    pictures, videos = [(b"a", (640, 480))] * num_pictures, [[b"1", b"2"]] * num_videos
    with pytest.raises(SampleFault) as fault:
        lay_out(turns(question), pictures, videos, ViewRules(**changes), MARK)
    assert fault.value.reason == reason


@pytest.mark.parametrize(
    "size", [(640, 480), (480, 640), (1600, 400), (400, 1600), (1200, 400), (400, 1200), (500, 500)]
)
def test_tiles_are_cut_out_of_the_scaled_picture_and_followed_by_the_whole(size):
    picture, side = rgb(*size), 378
    image_format = replace(FORMAT, size=side)
    rows, columns = choose_anchor(*size, side)
    views = to_views(picture, image_format, rows * columns + 1)
    assert views.dtype == torch.uint8 and views.shape == (rows * columns + 1, 3, side, side)
    scaled = Image.fromarray(picture).resize((side * columns, side * rows), Image.Resampling.BICUBIC)
    for k in range(rows * columns):
        left, top = side * (k % columns), side * (k // columns)
        tile = np.asarray(scaled.crop((left, top, left + side, top + side))).transpose(2, 0, 1)
        # In levels of 255. Filters round to 8 bits between their passes, which Pillow 13 swaps for tall pictures.
        limit = 0.5 if picture.shape[0] > picture.shape[1] else 0.02
        assert np.abs(views[k].numpy() - tile.astype(np.float32)).mean() < limit
    assert torch.equal(views[-1], to_pixels(picture, image_format))
    assert torch.equal(to_views(picture, image_format, 1), views[-1:])
    with pytest.raises(DataError, match="tiles and the whole are meant"):
        to_views(picture, image_format, rows * columns + 2)


def test_every_grid_is_chosen_by_some_picture():
    assert {
        choose_anchor(*size, 8) for size in [(31, 23), (23, 31), (40, 10), (10, 40), (30, 10), (10, 30), (9, 9)]
    } == {*ANCHORS}


def test_size_is_that_of_the_decoded_picture():
    assert picture_size(png(31, 23)) == (31, 23)
    with pytest.raises(SampleFault, match="picture"):
        picture_size(b"<html>")


# The conversation format ----------------------------------------------------------------------------------------------


def authors(rounds, tokenizer, placeholder="<|image|>"):
    """Ids and labels as mPLUG-Owl3's processor makes them: chunk by chunk, user turns split at the placeholder."""
    chunks = [("<|im_start|>system\n<|im_end|>", False)]
    for question, answer in rounds:
        pieces = f"\n<|im_start|>user\n{question}<|im_end|>".split(placeholder)
        chunks.append((pieces[0], False))
        for piece in pieces[1:]:
            chunks += [(placeholder, False), (piece, False)]
        chunks += [("\n<|im_start|>assistant\n", False), (f"{answer}<|im_end|>", True), ("<|endoftext|>", True)]
    ids, labels = [], []
    for text, is_target in chunks:
        own = tokenizer.encode(text, bos=False)
        ids += own
        labels += own if is_target else [IGNORE] * len(own)
    return ids, labels


WORDS = st.text(st.sampled_from("ab Q\n .?"), min_size=1, max_size=12)


def test_ids_and_targets_equal_the_authors(make_tokenizer):
    tokenizer = load_tokenizer(make_tokenizer("byte_bpe", added_tokens=ADDED))
    form = template("mplug_owl3")
    form.check(tokenizer)
    placeholder = tokenizer.encode("<|image|>", bos=False)
    assert len(placeholder) > 1

    @QUIET
    @given(st.lists(st.tuples(WORDS, WORDS.filter(str.strip), st.integers(0, 3)), min_size=1, max_size=3))
    def check(rounds):
        texts = [(f"{MARK} and ".join([question, *"x" * num]), answer) for question, answer, num in rounds]
        num_images = sum(num for *_, num in rounds)
        said = [turn for question, answer in texts for turn in (("human", question), ("gpt", answer))]
        ids, spans = tokenise(said, num_images, form, tokenizer, MARK)
        found, labels, starts = expand(ids, spans, 99, 10**6, placeholder)
        expected = authors([(question.replace(MARK, "<|image|>"), answer) for question, answer in texts], tokenizer)
        assert (found.tolist(), labels.tolist()) == expected
        assert len(starts) == num_images
        assert all(found[start : start + len(placeholder)].tolist() == placeholder for start in starts)

    check()


def test_a_marker_in_an_answer_is_a_fault(make_tokenizer):
    tokenizer = load_tokenizer(make_tokenizer("byte_bpe", added_tokens=ADDED))
    with pytest.raises(SampleFault, match="marker in an answer"):
        tokenise(turns("Draw.", "<image>"), 1, template("mplug_owl3"), tokenizer, MARK)


def test_an_end_of_other_tokens_than_two_is_refused(make_tokenizer):
    tokenizer = load_tokenizer(make_tokenizer("byte_bpe"))
    with pytest.raises(DataError, match="<.im_end.><.endoftext.>.*tokens"):
        template("mplug_owl3").check(tokenizer)


def test_a_caption_has_no_markup(make_tokenizer):
    tokenizer = load_tokenizer(make_tokenizer("byte_bpe", added_tokens=ADDED))
    ids, spans = tokenise(turns("<image>\nDescribe it.", "A cat"), 1, template("mplug_owl3_plain"), tokenizer, MARK)
    assert ids[0] == IMAGE and tokenizer.decode(ids[1:].tolist()) == "A cat<|endoftext|>"
    assert spans.tolist() == [[1, len(ids)]]


# From records to batches ----------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(make_tokenizer, tmp_path):
    (tmp_path / "images").mkdir()
    for name, size in (("wide.png", (31, 23)), ("small.png", (5, 5))):
        (tmp_path / "images" / name).write_bytes(png(*size))
    return Recipe(
        image_dir=tmp_path / "images",
        tokenizer_dir=make_tokenizer("byte_bpe", added_tokens=ADDED),
        template="mplug_owl3",
        marker=MARK,
        views=ViewRules(cut="all", text="v3", tile_size=8),
    )


def record(question, images=(), videos=()):
    return Record(where="item 1", id="", images=list(images), turns=turns(question), videos=list(videos))


def written(recipe, records, prefix):
    preparer = Preparer(recipe)
    placeholder = preparer.tokenizer.encode("<|image|>", bos=False)
    with Writer(prefix) as writer:
        for item in records:
            document = preparer(item)
            assert isinstance(document, Document), document
            writer.add(document.ids, document.images, document.spans)
        views = {"cut": "all", "tile_size": recipe.views.tile_size}
        writer.finish({"family": "mplug_owl3", "placeholder": placeholder, "views": views})
    return placeholder


def test_samples_of_many_views(recipe, tmp_path):
    records = [record("Look: <image> or <image>?", ["wide.png", "small.png"]), record("Nothing to see.")]
    placeholder = written(recipe, records, tmp_path / "set")
    dataset = Dataset(tmp_path / "set", FORMAT, max_tokens=10**4)
    assert dataset.reader.views(0) == [(0, 7), (7, 5)] and dataset.reader.views(1) == []
    assert dataset.reader.num_images.tolist() == [12, 0] and dataset.reader.info["images"] == 12
    sample = dataset[0]
    assert dataset.num_tokens.tolist() == [len(dataset[i].ids_S) for i in range(2)]
    assert sample.num_images == len(sample.starts_I) == 12 and IMAGE not in sample.ids_S
    expected = torch.cat([to_views(rgb(31, 23), FORMAT, 7), to_views(rgb(5, 5), FORMAT, 5)])
    assert torch.equal(sample.pixels_I3HW, expected)
    for start in sample.starts_I.tolist():
        assert sample.ids_S[start : start + len(placeholder)].tolist() == placeholder

    cut = Dataset(tmp_path / "set", FORMAT, max_tokens=int(sample.starts_I[9]) + 1)[0]  # in the second picture's tiles
    assert cut.num_images == 10 and torch.equal(cut.pixels_I3HW, expected[:10])

    options = {"pad_id": 0, "tokens_per_image": 4, "with_pixels": True, "image_size": 8}
    batch = collate([dataset[1], sample], pad_multiple=4, **options)
    length = batch.ids_BS.size(1)
    assert batch.starts_BM.tolist() == [[length] * 12, sample.starts_I.tolist()]
    assert not len(batch.slots_K) and not len(batch.rows_K) and batch.num_images == 12
    alone = collate([dataset[1]], pad_multiple=4, **options)
    assert alone.starts_BM.tolist() == [[alone.ids_BS.size(1)]] and alone.pixels_I3HW.shape == (1, 3, 8, 8)


def test_a_dataset_cut_for_another_tower_and_padded_tiles_are_refused(recipe, tmp_path):
    written(recipe, [record("<image>", ["wide.png"])], tmp_path / "set")
    other = ImageFormat(size=16, mean=(0.5,) * 3, tokens=4)
    with pytest.raises(DataError, match="tiles of 8 pixels.*--tile-size 16"):
        Dataset(tmp_path / "set", other, 100)
    padded = ImageFormat(size=8, mean=(0.5,) * 3, aspect="pad", resize="squash", tokens=4)
    with pytest.raises(DataError, match=r"data\.aspect: pad"):
        Dataset(tmp_path / "set", padded, 10**4)[0]


def test_a_view_of_no_picture_is_refused(tmp_path):
    with Writer(tmp_path / "set") as writer:
        writer.add(np.array([IMAGE, IMAGE], np.int32), [None, png(5, 5)], np.empty((0, 2), np.int32))
        writer.finish({})
    with pytest.raises(DataError, match="begins with a view of no picture"):
        Reader(tmp_path / "set").views(0)


def test_templates_that_move_markers_have_no_views(recipe, make_tokenizer):
    plain = Recipe(image_dir=recipe.image_dir, tokenizer_dir=recipe.tokenizer_dir, template="phi", marker=MARK)
    fault = Preparer(plain)(record("<video>", videos=["clip.mp4"]))
    assert isinstance(fault, Fault) and "a video, which this template has no form for" in str(fault.fault)
    cut = Recipe(
        image_dir=recipe.image_dir,
        tokenizer_dir=recipe.tokenizer_dir,
        template="phi",
        marker=MARK,
        views=ViewRules(cut="single"),
    )
    with pytest.raises(DataError, match="--cut: template phi"):
        Preparer(cut)
