"""The benchmark of the data side runs; how fast anything is, is no matter of a test."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def benchmark(monkeypatch):
    spec = importlib.util.spec_from_file_location("benchmark_data", ROOT / "tools" / "benchmark" / "data.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "benchmark_data", module)  # its dataclass looks its own module up
    spec.loader.exec_module(module)
    return module


def test_every_ratio_is_measured(benchmark, tmp_path, capsys):
    model = ROOT / "tests" / "golden" / "template_masks" / "tokenizers" / "spm_bpe_400.model"
    shutil.copy(model, tmp_path / "tokenizer.model")
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    benchmark.main(
        benchmark.Arguments(tokenizer=tmp_path, rounds=2, pictures=1, conversations=3, out=tmp_path / "out.json")
    )
    found = json.loads((tmp_path / "out.json").read_text())
    assert [*found["images"]] == ["448x448", "640x480", "1024x768"]
    ratios = [of[name] for of in found["images"].values() for name in of if "against" in name]
    assert len(ratios) == 3 * 4
    ratios += [of[name] for of in found["preprocess"].values() for name in ("against_slower", "against_checked")]
    ratios.append(found["preprocess"]["text and pictures"]["unchecked_against_slower"])
    assert all(0 < ratio["min"] <= ratio["median"] <= ratio["max"] for ratio in ratios)
    assert "opening 1,000,000 samples" in capsys.readouterr().out
