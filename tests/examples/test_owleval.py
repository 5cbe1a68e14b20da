"""Real photographs and conversations through the commands that a user types: preprocess, train at TP 2 x PP 2."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megamm.data.image import decode
from megamm.data.indexed import Reader

ROOT = Path(__file__).parents[2]
OWLEVAL = Path(os.environ.get("MEGAMM_OWLEVAL", ROOT.parent / "shared/data/owleval"))
TOKENIZER = ROOT / "tests/golden/template_masks/tokenizers/spm_bpe_400.model"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not OWLEVAL.is_dir(), reason=f"no OwlEval pictures in {OWLEVAL}; set MEGAMM_OWLEVAL"),
]

CONFIG = {
    "model_type": "llava",
    "image_token_index": 511,
    "text_config": {
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 320,
        "intermediate_size": 896,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5,
    },
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "image_size": 112,
        "patch_size": 14,
    },
}
RECIPE = """
from megamm.config import Checkpoint, Config, Data, Model, Optim, Parallel, Train


def config():
    return Config(
        model=Model(family="llava", config="config.json"),
        data=Data(path="owleval", max_tokens=256, num_workers=1),
        parallel=Parallel(tp=2, pp=2, sequence_parallel=True),
        optim=Optim(lr=1e-3, warmup=0.1),
        train=Train(global_batch=8, micro_batch=4, steps=30, precision="fp32"),
        checkpoint=Checkpoint(dir="run"),
    )
"""


def run(*words: object, directory: Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def first_and_last(log: Path) -> tuple[float, float]:
    """Mean losses of the first and of the last five of 30 steps."""
    losses = [json.loads(line)["loss"] for line in log.read_text().splitlines()]
    assert len(losses) == 30
    return sum(losses[:5]) / 5, sum(losses[-5:]) / 5


def test_a_model_of_20_million_parameters_learns_from_real_photographs(tmp_path):
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.model").write_bytes(TOKENIZER.read_bytes())
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **special}))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "recipe.py").write_text(RECIPE)

    source = ("--input", OWLEVAL / "llava.json", "--image-dir", OWLEVAL / "images")
    run(
        ROOT / "data_tools/preprocess.py", *source, "--family", "llava", "--tokenizer", tokenizer,
        "--output", tmp_path / "owleval", "--max-bad", "0", directory=tmp_path,
    )  # fmt: skip
    reader = Reader(tmp_path / "owleval")
    records = json.loads((OWLEVAL / "llava.json").read_text())
    assert len(reader) == len(records)
    assert reader.num_images.sum() == sum("image" in record for record in records)
    for document, count in enumerate(reader.num_images):
        for image in range(count):
            height, width, channels = decode(reader.image(document, image)).shape
            assert min(height, width) > 100 and channels == 3

    packed = run(ROOT / "data_tools/pack.py", "owleval", "--max-tokens", 4096, directory=tmp_path)
    assert float(packed.split(" tokens fill ")[1].split("%")[0]) >= 97.0

    shown = run("-m", "megamm.train", "recipe.py", "--dry-run", directory=tmp_path)
    assert "4 ranks = tp 2 x pp 2 x dp 1" in shown
    run(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 4, "-m", "megamm.train", "recipe.py",
        directory=tmp_path,
    )  # fmt: skip
    first, last = first_and_last(tmp_path / "run/log.jsonl")
    print(f"mean loss of the first five steps {first:.3f}, of the last five {last:.3f}")
    assert last <= first - 0.5

    run(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 4, "-m", "megamm.train", "recipe.py",
        "--data.packing", "--data.max-tokens", 512, "--train.global-batch", 4, "--train.micro-batch", 2,
        "--checkpoint.dir", "packed", directory=tmp_path,
    )  # fmt: skip
    first, last = first_and_last(tmp_path / "packed/log.jsonl")
    assert last <= first - 0.5
