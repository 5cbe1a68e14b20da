import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from megamm.batch import IGNORE, IMAGE
from megamm.data.faults import SampleFault
from megamm.data.template import template
from megamm.data.text import expand, tokenise
from megamm.data.tokenizer import load_tokenizer

QUIET = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
WORDS = st.text(alphabet="abcdefgh .,:!?'0123456789éß日🙂\n", min_size=1, max_size=30).map(str.strip).filter(bool)


def authors_ids(text, stock):
    """LLaVA's tokenizer_image_token, transcribed."""
    parts = [stock(part)["input_ids"] for part in text.split("<image>")]
    ids, skip = [], 0
    if parts[0] and parts[0][0] == stock.bos_token_id:
        ids, skip = [stock.bos_token_id], 1
    for j, part in enumerate(parts):
        ids += ([IMAGE] if j else []) + part[skip:]
    return ids


def authors_v1_labels(text, ids, stock, legacy):
    """LLaVA's preprocess_v1, transcribed; None where the authors drop the sample."""
    labels, cur = list(ids), 1
    labels[:1] = [IGNORE]
    for i, piece in enumerate(text.split("</s>")):
        if not piece:
            break
        parts = piece.split(" ASSISTANT: ")
        if len(parts) != 2:
            break
        late = int(i > 0 and not legacy)
        length = len(authors_ids(piece, stock)) - late
        instruction = len(authors_ids(parts[0] + " ASSISTANT: ", stock)) - 2 - late
        labels[cur : cur + instruction] = [IGNORE] * instruction
        cur += length
    labels[cur:] = [IGNORE] * len(labels[cur:])
    return [IGNORE if label == IMAGE else label for label in labels] if cur == len(ids) else None


@pytest.mark.parametrize("legacy", [True, False])
def test_any_conversation_equals_the_authors(legacy, make_tokenizer):
    directory = make_tokenizer("spm", legacy=legacy)
    tokenizer, stock = load_tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    compared = 0

    @QUIET
    @given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3), st.booleans())
    def check(rounds, with_image):
        nonlocal compared
        if with_image:
            rounds = [(f"<image>\n{rounds[0][0]}", rounds[0][1]), *rounds[1:]]
        turns = [turn for q, a in rounds for turn in (("human", q), ("gpt", a))]
        ids, spans = tokenise(turns, int(with_image), template("v1"), tokenizer, "<image>")
        text, _ = template("v1").render(rounds, "<image>")
        assert ids.tolist() == authors_ids(text, stock)
        expected = authors_v1_labels(text, ids.tolist(), stock, legacy)
        if expected is not None:
            compared += 1
            assert expand(ids, spans, 1, 10**6)[1].tolist() == expected

    check()
    assert compared > 30  # otherwise the masks were hardly looked at


@pytest.mark.parametrize(("name", "token"), [("phi", None), ("phi2", "</s>"), ("qwen2", "<|im_end|>")])
def test_targets_are_answer_and_end(name, token, make_tokenizer):
    added = {} if token is None else {token: 457, "<|im_start|>": 458}
    tokenizer = load_tokenizer(make_tokenizer("byte_bpe", added_tokens=added))
    form = template(name)

    @QUIET
    @given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3))
    def check(rounds):
        turns = [turn for q, a in rounds for turn in (("human", q), ("gpt", a))]
        ids, spans = tokenise(turns, 0, form, tokenizer, "<image>")
        assert tokenizer.decode(ids.tolist()) == form.render(rounds, "<image>")[0]
        found = [tokenizer.decode(ids[start:end].tolist()) for start, end in spans]
        assert found == [form.lead + answer + form.end for _, answer in rounds]

    check()


def test_trimmed_offsets_change_nothing(make_tokenizer):
    directory = make_tokenizer("byte_bpe")
    turns = [("human", "How many?"), ("gpt", " 5  dogs")]
    expected = tokenise(turns, 0, template("phi"), load_tokenizer(directory), "<image>")
    content = json.loads((directory / "tokenizer.json").read_text())
    flags = {"add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    content["post_processor"] = {"type": "ByteLevel"} | flags
    (directory / "tokenizer.json").write_text(json.dumps(content))
    found = tokenise(turns, 0, template("phi"), load_tokenizer(directory), "<image>")
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_markers_of_a_turn_become_one_in_front(make_tokenizer):
    tokenizer = load_tokenizer(make_tokenizer("spm"))
    tidy = [("human", "<image>\nWhat is  it?"), ("gpt", "A cat")]
    for text in ("What is <image> it?", " <image>What is  it?\n<image>", "<image>\nWhat is  it?"):
        found = tokenise([("human", text), tidy[1]], 1, template("v1"), tokenizer, "<image>")
        expected = tokenise(tidy, 1, template("v1"), tokenizer, "<image>")
        assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_marker_in_an_answer_is_no_target(make_tokenizer):
    tokenizer = load_tokenizer(make_tokenizer("spm"))
    ids, spans = tokenise([("human", "Draw."), ("gpt", "<image>\nA cat")], 1, template("v1"), tokenizer, "<image>")
    covered = np.concatenate([np.arange(start, end) for start, end in spans])
    assert IMAGE in ids and IMAGE not in ids[covered] and ids[covered][-1] == tokenizer.eos_id


def test_leading_answer_is_dropped(make_tokenizer):
    tokenizer = load_tokenizer(make_tokenizer("spm"))
    turns = [("human", "Hi"), ("gpt", "yes")]
    found = tokenise([("gpt", "Welcome"), *turns], 0, template("v1"), tokenizer, "<image>")
    expected = tokenise(turns, 0, template("v1"), tokenizer, "<image>")
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("turns", "num_images", "reason"),
    [
        ([("human", "Hi"), ("gpt", "")], 0, "no_answer"),
        ([("human", "Hi"), ("gpt", "yes"), ("human", "Why?"), ("gpt", " \n")], 0, "no_answer"),
        ([("human", "Hi"), ("gpt", "yes"), ("human", "Why?")], 0, "no_answer"),
        ([], 0, "no_answer"),
        ([("human", "Hi"), ("human", "Hi")], 0, "bad_roles"),
        ([("system", "Be nice"), ("human", "Hi")], 0, "bad_roles"),
        ([("human", "<image>"), ("gpt", "a")], 0, "marker_count"),
        ([("human", "Hi"), ("gpt", "a")], 1, "marker_count"),
        ([("human", "<image> <image>"), ("gpt", "a")], 3, "marker_count"),
    ],
)
def test_faults(turns, num_images, reason, make_tokenizer):
    tokenizer = load_tokenizer(make_tokenizer("spm"))
    with pytest.raises(SampleFault) as fault:
        tokenise(turns, num_images, template("v1"), tokenizer, "<image>")
    assert fault.value.reason == reason


STORED = np.array([5, IMAGE, 6, 7, IMAGE, 8, 9], np.int32)
TARGETS = np.array([[3, 4], [5, 7]], np.int32)


def test_expand():
    ids, labels, starts = expand(STORED, TARGETS, tokens_per_image=3, max_tokens=100)
    I, _ = IMAGE, IGNORE  # noqa: E741
    assert ids.tolist() == [5, I, I, I, 6, 7, I, I, I, 8, 9]
    assert labels.tolist() == [_, _, _, _, _, 7, _, _, _, 8, 9]
    assert (starts.tolist(), ids.dtype, labels.dtype) == ([1, 6], np.int64, np.int64)


def test_a_placeholder_of_ordinary_ids_may_stand_for_a_picture():
    """Its ids stand elsewhere, too: where a picture begins is known from where it was put."""
    stored = np.array([IMAGE, 5, 3, 5, IMAGE, IMAGE, 8], np.int32)
    ids, labels, starts = expand(stored, np.array([[5, 7]], np.int32), 9, max_tokens=100, placeholder=[5, 3])
    assert ids.tolist() == [5, 3, 5, 3, 5, 5, 3, 5, 3, 8] and starts.tolist() == [0, 5, 7]
    assert labels.tolist() == [IGNORE] * 9 + [8]
    ids, _, starts = expand(stored, np.empty((0, 2), np.int32), 9, max_tokens=6, placeholder=[5, 3])
    assert ids.tolist() == [5, 3, 5, 3, 5, 5] and starts.tolist() == [0, 5]


def test_image_inside_a_span_is_no_target():
    labels = expand(STORED, np.array([[0, 7]], np.int32), tokens_per_image=2, max_tokens=100)[1]
    assert labels.tolist() == [5, IGNORE, IGNORE, 6, 7, IGNORE, IGNORE, 8, 9]


@pytest.mark.parametrize(("max_tokens", "num_images"), [(11, 2), (8, 2), (7, 2), (6, 1), (2, 1), (1, 0)])
def test_cut_comes_after_expansion_and_may_fall_into_an_image(max_tokens, num_images):
    whole_ids, whole_labels, _ = expand(STORED, TARGETS, 3, 100)
    ids, labels, starts = expand(STORED, TARGETS, 3, max_tokens)
    assert ids.tolist() == whole_ids[:max_tokens].tolist() and labels.tolist() == whole_labels[:max_tokens].tolist()
    assert len(starts) == num_images
