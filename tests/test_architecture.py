"""The layers hold: imports point down, and GPU words stay in the backend."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GPU_WORDS = ("cuda", "nccl", "transformer_engine")


@pytest.mark.parametrize("folder", ["megamm", "tools", "data_tools", "examples"])
def test_gpu_words_stand_only_in_the_backend(folder: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path.parent != ROOT / "megamm" / "backend"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if any(word in line for word in GPU_WORDS)
    ]
    assert not found


def test_the_import_contracts_hold() -> None:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    done = subprocess.run([*command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("module", ["megamm", "megamm.config", "megamm.errors", "megamm.log"])
def test_what_a_recipe_imports_is_light(module: str) -> None:
    code = f"import sys, {module}; print(*({{'torch', 'megatron', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("\n", "")
