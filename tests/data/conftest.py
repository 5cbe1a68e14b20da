"""Tokenizers and small datasets for the tests of the data side."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megamm.batch import IMAGE
from megamm.data.indexed import Writer

GOLDEN = Path(__file__).parent.parent / "golden" / "template_masks"

KINDS: dict[str, dict[str, Any]] = {
    # Llama-like: SentencePiece with byte fallback, begins every text with <s>, <unk> serves as padding.
    "spm": {"file": "tokenizers/spm_bpe_400.model", "legacy": False, "bos_token": "<s>", "eos_token": "</s>"},
    # Phi-like: byte-level, nothing in front of a text.
    "byte_bpe": {"file": "tokenizers/byte_bpe_457.json"}
    | dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
}


@pytest.fixture
def make_tokenizer(tmp_path: Path) -> Callable[..., Path]:
    """Builds the directory of a tokenizer: one of KINDS, or as a golden entry describes it; keywords change that."""

    def make(what: str | dict[str, Any], **changes: Any) -> Path:
        spec = (KINDS[what] if isinstance(what, str) else what) | changes
        directory = tmp_path / "tokenizer"
        directory.mkdir()
        config = {key: spec[key] for key in ("bos_token", "eos_token", "unk_token", "pad_token") if key in spec}
        source = GOLDEN / spec["file"]
        if source.suffix == ".model":
            shutil.copy(source, directory / "tokenizer.model")
            config |= {"tokenizer_class": "LlamaTokenizer", "legacy": spec["legacy"], "add_bos_token": True}
        else:
            shutil.copy(source, directory / "tokenizer.json")
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
        flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False) | {"special": True}
        added = spec.get("added_tokens", {})
        config["added_tokens_decoder"] = {str(i): {"content": token} | flags for token, i in added.items()}
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
        return directory

    return make


def picture(seed: int) -> bytes:
    """A small random picture file."""
    size = (20 + seed % 3, 12 + seed % 5)
    rgb = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(rgb).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def make_dataset(tmp_path: Path) -> Callable[..., Path]:
    """Writes `num` documents; document i begins with id 1000 + i, has i % 3 pictures and one target span at its end."""

    def make(num: int, name: str = "set") -> Path:
        with Writer(tmp_path / name) as writer:
            for i in range(num):
                ids = [1000 + i] + [IMAGE, 7] * (i % 3) + list(range(100, 103 + i))
                images = [picture(10 * i + k) for k in range(i % 3)]
                writer.add(np.array(ids, np.int32), images, np.array([[len(ids) - 2, len(ids)]], np.int32))
            writer.finish({"family": "llava"})
        return tmp_path / name

    return make
