import json
import shutil

import numpy as np
import pytest
from transformers import AutoTokenizer

from megamm.data.tokenizer import load_tokenizer
from megamm.errors import DataError

TEXTS = ["A cat on a mat.", "  two", "é日", "line\n\nbreak", "a</s>USER: b", " ", "", "<image>"]


@pytest.mark.parametrize(("kind", "changes"), [("spm", {}), ("spm", {"legacy": True}), ("byte_bpe", {})])
def test_same_ids_as_stock_transformers(kind, changes, make_tokenizer):
    directory = make_tokenizer(kind, **changes)
    tokenizer, stock = load_tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    for text in TEXTS:
        assert tokenizer.encode(text, bos=True) == stock(text)["input_ids"]
        places = stock(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        ranges = [(start, end) for start in range(-1, len(text) + 1) for end in range(start + 1, len(text) + 3)]
        ids, found = tokenizer.encode_ranges(text, ranges)
        assert ids.tolist() == tokenizer.encode(text, bos=False) and ids.dtype == np.int32
        for (start, end), (first, last) in zip(ranges, found, strict=True):
            shared = [i for i, (a, b) in enumerate(places) if a < end and b > start]
            assert list(range(first, last)) == shared


def test_special_ids(make_tokenizer):
    tokenizer = load_tokenizer(make_tokenizer("spm"))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.adds_bos) == (1, 2, 0, True)
    assert (tokenizer.vocab_size, tokenizer.name) == (400, "tokenizer.model")
    assert tokenizer.decode(tokenizer.encode("A cat é日</s>", bos=True)) == "<s> A cat é日</s>"


def test_no_bos_is_added_where_the_tokenizer_adds_none(make_tokenizer):
    tokenizer = load_tokenizer(make_tokenizer("byte_bpe", added_tokens={"</s>": 457}))
    assert (tokenizer.bos_id, tokenizer.adds_bos, tokenizer.vocab_size) == (0, False, 458)
    assert tokenizer.encode("", bos=True) == []


def test_hash_follows_content_and_not_place(make_tokenizer, tmp_path):
    directory = make_tokenizer("spm")
    before = load_tokenizer(directory).hash
    shutil.copytree(directory, tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("of no matter")
    assert load_tokenizer(tmp_path / "copy").hash == before
    config = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(config | {"legacy": True}))
    assert load_tokenizer(directory).hash != before


def test_stored_truncation_and_padding_are_not_obeyed(make_tokenizer):
    directory = make_tokenizer("byte_bpe")
    expected = load_tokenizer(directory).encode("A cat on a mat.", bos=True)
    content = json.loads((directory / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {"strategy": {"Fixed": 30}, "direction": "Right", "pad_to_multiple_of": None}
    content["padding"] |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"}
    (directory / "tokenizer.json").write_text(json.dumps(content))
    assert load_tokenizer(directory).encode("A cat on a mat.", bos=True) == expected


def test_errors_name_directory_and_remedy(make_tokenizer, tmp_path):
    with pytest.raises(DataError, match="holds no tokenizer; give a directory"):
        load_tokenizer(tmp_path / "absent")
    directory = make_tokenizer("byte_bpe")
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(DataError, match="set eos_token in tokenizer_config.json"):
        load_tokenizer(directory)
    (directory / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="cannot load this tokenizer"):
        load_tokenizer(directory)
