import numpy as np
import pytest

from megamm.batch import IMAGE
from megamm.data.display import stretches
from megamm.data.tokenizer import load_tokenizer


@pytest.mark.parametrize("kind", ["spm", "byte_bpe"])
def test_stretches_are_the_whole_text_in_order(kind, make_tokenizer):
    tokenizer = load_tokenizer(make_tokenizer(kind))
    pieces = ["What is it, \u00e9\u4e2d?", " A cat", " and more"]
    ids = [tokenizer.encode(piece, bos=False) for piece in pieces]
    first, second = len(ids[0]), len(ids[0]) + len(ids[1])
    joined = np.array([*ids[0], *ids[1], IMAGE, *ids[2]], np.int32)
    found = stretches(joined, np.array([[first, second]], np.int32), tokenizer)
    assert [(stretch.kind, stretch.num_ids) for stretch in found] == [
        ("context", first),
        ("target", second - first),
        ("image", 1),
        ("context", len(ids[2])),
    ]
    assert "".join(stretch.text for stretch in found[:2]) == tokenizer.decode(ids[0] + ids[1])
    assert found[3].text == " and more"


def test_no_ids_and_only_pictures(make_tokenizer):
    tokenizer = load_tokenizer(make_tokenizer("spm"))
    none = np.empty((0, 2), np.int32)
    assert stretches(np.array([], np.int32), none, tokenizer) == []
    assert [stretch.kind for stretch in stretches(np.array([IMAGE] * 2, np.int32), none, tokenizer)] == ["image"] * 2
