"""VW-LMM's releases, for the tests of its file and of its training."""

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from megamm.models import vw_lmm

VARIANTS = {"llama": vw_lmm.FAMILY, "mistral": vw_lmm.FAMILY, "pif": vw_lmm.PIF}
"""Golden variant -> its family."""
NUM_WORDS = 125
"""Rows in the vocabulary of `odd_release`; 128 are stored."""


def odd_release(release: Path, to: Path) -> Path:
    """The release with as many rows in its vocabulary as no layout divides."""
    shutil.copytree(release, to)
    tensors = load_file(to / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight", "vm_head.weight"):
        tensors[name] = tensors[name][:NUM_WORDS].clone()
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(config | {"vocab_size": NUM_WORDS}))
    return to
