import base64
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from megamm.batch import IMAGE
from megamm.data.indexed import Writer
from megamm.errors import DataError

CONFIG = Path(__file__).parents[1] / "golden" / "llava" / "hf_native" / "hf"


@pytest.fixture
def show(load_script):
    return load_script("show")


@pytest.fixture
def dataset(script, inputs):
    items = json.loads(inputs["input"][0].read_text())[:3]
    items[1]["conversations"][1]["value"] = "<script>&\x1b[31m"
    items[2]["image"] = ["0.jpg", "2.jpg"]
    items[2]["conversations"] = [
        {"from": "human", "value": "This <image> or\n<image>?"},
        {"from": "gpt", "value": "The first one"},
        {"from": "human", "value": "Why?"},
        {"from": "gpt", "value": "So"},
    ]
    inputs["input"][0].write_text(json.dumps(items))
    script.main(script.Options(**inputs))
    return inputs


def test_text_targets_and_counts(show, dataset, capsys):
    show.main(show.Options(prefix=dataset["output"], tokenizer=dataset["tokenizer"], sample=2))
    out = capsys.readouterr().out
    assert "sample 2 of 3" in out and "2 pictures" in out and "picture 2: PNG 20 x 12" in out
    text = " ".join(out.split())
    assert "This [picture 1] or [picture 2] ? ASSISTANT:" in text  # Llama's tokenizer begins a text with a space
    assert text.endswith("The first one</s>USER: Why? ASSISTANT: So</s>")


def test_a_page_holds_all_it_shows(show, dataset, tmp_path, capsys):
    page = tmp_path / "page.html"
    options = {"prefix": dataset["output"], "tokenizer": dataset["tokenizer"], "html": page}
    show.main(show.Options(**options, sample=1, model=CONFIG))
    content = page.read_text()
    assert "<script>" not in content and "&lt;script&gt;&amp;\\x1b[31m" in content
    assert "\x1b[31m" not in content + capsys.readouterr().out
    assert not re.search(r'(src|href)="(?!data:)', content)
    first, seen = re.findall(r'src="data:image/(?:jpeg|png);base64,([^"]+)"', content)
    assert base64.b64decode(first) == (dataset["image_dir"] / "1.jpg").read_bytes()
    assert base64.b64decode(seen).startswith(b"\x89PNG") and "image tokens" in content
    targets = re.findall(r'<span class="target"[^>]*>([^<]*)</span>', content)
    assert targets[0].endswith("&lt;/s&gt;")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample": 3}, "--sample: 3; .*has samples 0 to 2"),
        ({"sample": -1}, "--sample: -1"),
        ({"prefix": "x"}, "x.json"),
    ],
)
def test_bad_options(changes, message, show, dataset):
    with pytest.raises(DataError, match=message):
        show.main(show.Options(**({"prefix": dataset["output"], "tokenizer": dataset["tokenizer"]} | changes)))


def test_views_of_a_picture_are_not_shown_as_pictures(show, tmp_path, tokenizer, inputs, capsys):
    with Writer(tmp_path / "set") as writer:
        image = (inputs["image_dir"] / "0.jpg").read_bytes()
        writer.add(np.array([5, IMAGE, IMAGE, IMAGE, 6], np.int32), [image, None, None], np.array([[4, 5]], np.int32))
        writer.finish({"family": "llava", "placeholder": [7, 8]})
    show.main(show.Options(prefix=str(tmp_path / "set"), tokenizer=tokenizer))
    out = capsys.readouterr().out
    assert "1 pictures\n3 views of them\n2 tokens stand for a view, 8 tokens in all" in out and "picture 2: " not in out


def test_another_tokenizer_is_refused(show, dataset, tmp_path):
    other = shutil.copytree(dataset["tokenizer"], tmp_path / "other")
    (other / "special_tokens_map.json").write_text("{}")
    with pytest.raises(DataError, match="another tokenizer .*give the one it was made with"):
        show.main(show.Options(prefix=dataset["output"], tokenizer=other))
