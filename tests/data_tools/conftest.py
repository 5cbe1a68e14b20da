"""The scripts as modules, and a small source for them."""

import importlib.util
import io
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "tests" / "golden" / "template_masks" / "tokenizers" / "spm_bpe_400.model"


@pytest.fixture(scope="session")
def load_script() -> Iterator[Callable[[str], ModuleType]]:
    """Imports data_tools/NAME.py."""

    def load(name: str) -> ModuleType:
        if name not in sys.modules:
            spec = importlib.util.spec_from_file_location(name, ROOT / "data_tools" / f"{name}.py")
            assert spec is not None and spec.loader is not None
            sys.modules[name] = importlib.util.module_from_spec(spec)  # its dataclass looks its own module up
            spec.loader.exec_module(sys.modules[name])
            loaded.append(name)
        return sys.modules[name]

    loaded: list[str] = []
    yield load
    for name in loaded:
        del sys.modules[name]


@pytest.fixture(scope="session")
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    """data_tools/preprocess.py."""
    return load_script("preprocess")


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a SentencePiece tokenizer."""
    directory = tmp_path_factory.mktemp("tokenizer")
    shutil.copy(MODEL, directory / "tokenizer.model")
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture
def inputs(tmp_path: Path, tokenizer: Path) -> dict[str, Any]:
    """Options of preprocess.py for forty good samples and two bad ones."""
    (tmp_path / "images").mkdir()
    items = []
    for i in range(42):
        rgb = np.random.default_rng(i).integers(0, 256, (10 + i, 20, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(rgb).save(file, "JPEG" if i % 2 else "PNG")
        content = file.getvalue() if i != 20 else file.getvalue()[:100]
        (tmp_path / "images" / f"{i}.jpg").write_bytes(content)
        answer = f"number {i}" if i != 7 else ""
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": answer}]
        items.append({"id": str(i), "image": f"{i}.jpg", "conversations": turns})
    (tmp_path / "llava.json").write_text(json.dumps(items))
    return {
        "input": (tmp_path / "llava.json",),
        "image_dir": tmp_path / "images",
        "family": "llava",
        "tokenizer": tokenizer,
        "output": str(tmp_path / "out" / "set"),
        "max_bad": 0.1,
    }


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five samples per piece, so that a small source has several."""
    monkeypatch.setattr("megamm.data.sources.piece.PIECE_RECORDS", 5)
